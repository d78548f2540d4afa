"""Keeps tokens that matter to the prompt and do not repeat each other.

Idea: maximize the total saliency of the kept tokens, provided that no two of them are more similar
than a threshold. Greedy: take the most salient token, put aside all that repeat it, go on.

Algorithm, with the last prompt embedding t:
    1. saliency s_i = cos(x_i, t);
    2. take the most salient token left; put aside every token whose cosine to it exceeds
       ``threshold``; repeat until k are taken;
    3. if no tokens are left before that, the most salient of those put aside fill the budget.

Shapes: features ``(B, N, D)``, prompt embeddings ``(B, P, D)`` -> picks ``(B, k)`` -> kept
``(B, k, D)``. Cost: O(N^2 D) for the Gram matrix, then O(k N). Beyond 16384 tokens no N x N matrix
is held: O(k N D).

There is no official code: this follows published descriptions. The threshold of 0.9 and step 3 are
choices of this implementation. Cosines within 2.5e-7 above the threshold do not count as above it;
ties go to the lowest index.

Published: no comparable table.

```bibtex
@article{pei2025greedyprune,
  title={{GreedyPrune}: Retenting Critical Visual Token Set for Large Vision Language Models},
  author={Pei, Ruiguang and Sun, Weiqing and Fu, Zhihui and Wang, Jun},
  journal={arXiv preprint arXiv:2506.13166},
  year={2025}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import TIE_TOLERANCE, gram_matrix, unit_vectors
from tokenreduce.ops.relevance import exclusive_picks
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens

#: Most tokens whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384


@dataclass(frozen=True, kw_only=True)
class GreedyPrune(Selector):
    """Keeps the tokens most similar to the end of the prompt that do not repeat each other.

    Args:
        threshold: largest cosine of two kept tokens, in [-1, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise PipelineError(f"{self.name}: threshold={self.threshold} must lie in [-1, 1].")

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        unit = unit_vectors(tokens.features.detach())
        last = unit_vectors(tokens.signal("prompt_embeddings").detach()[:, -1])
        if last.shape[1] != unit.shape[2]:
            raise TokensError(
                f"{self.name}: prompt embeddings of {last.shape[1]} channels cannot be compared "
                f"with tokens of {unit.shape[2]}; it runs where tokens are in the LLM's space."
            )
        saliency = (unit @ last[..., None]).squeeze(2)
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, GRAM_LIMIT**2 // tokens.count**2)
        parts = zip(unit.split(together), saliency.split(together), strict=True)
        return torch.cat([self._pick(part, own, k) for part, own in parts])

    def _pick(self, unit: Tensor, saliency: Tensor, k: int) -> Tensor:
        gram = gram_matrix(unit) if unit.shape[1] <= GRAM_LIMIT else None
        threshold = self.threshold + TIE_TOLERANCE
        return exclusive_picks(unit, saliency, k, threshold=threshold, gram=gram)
