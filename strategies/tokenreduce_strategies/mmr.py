"""Keeps tokens by maximal marginal relevance: a high score, but unlike what is kept already.

Idea: any score of importance picks many alike. Charge each candidate for its similarity to the most
similar token chosen so far. The score is the user's: any signal with one value for each token.

Algorithm, with scores s_i scaled to [0, 1] over the item and cosines c_ij:
    1. S = {};
    2. k times: add argmax over i not in S of ``balance`` s_i - (1 - ``balance``) max_{j in S} c_ij,
       where the maximum over the empty set is 0.

Shapes: features ``(B, N, D)``, scores ``(B, N)`` -> picks ``(B, k)`` -> kept ``(B, k, D)``. Cost:
O(N^2 D) for the Gram matrix, then O(k N). Beyond 16384 tokens no N x N matrix is held: O(k N D).

Maximal marginal relevance is due to Carbonell and Goldstein (1998). IDPruner uses it for visual
tokens with a score that needs trained weights, which are no part of this; with class attention, the
default, it is no published method. Equal scores everywhere count as 0; ties go to the lowest index.

```bibtex
@inproceedings{carbonell1998mmr,
  title={The Use of {MMR}, Diversity-Based Reranking for Reordering Documents and Producing
         Summaries},
  author={Carbonell, Jaime and Goldstein, Jade},
  booktitle={Proceedings of the 21st Annual International ACM SIGIR Conference on Research and
             Development in Information Retrieval},
  year={1998}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import gram_matrix, unit_vectors
from tokenreduce.ops.relevance import marginal_relevance
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens

#: Most tokens whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384


@dataclass(frozen=True, kw_only=True)
class MMR(Selector):
    """Keeps tokens of high score that are unlike each other.

    Args:
        score: the signal that scores tokens, one value for each.
        balance: weight of the score against similarity, in [0, 1]; 1 is the score alone.

    Raises:
        PipelineError: if an option is out of range.
    """

    score: str = "class_attention"
    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise PipelineError(f"{self.name}: balance={self.balance} must lie in [0, 1].")

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.score,)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        score = tokens.signal(self.score).detach().float()
        if score.ndim != 2:
            raise PipelineError(
                f"{self.name}: score={self.score!r} has shape {tuple(score.shape)}; a score is one "
                "value for each token."
            )
        low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
        score = (score - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)
        unit = unit_vectors(tokens.features.detach())
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, GRAM_LIMIT**2 // tokens.count**2)
        parts = zip(unit.split(together), score.split(together), strict=True)
        return torch.cat([self._pick(part, own, k) for part, own in parts])

    def _pick(self, unit: Tensor, score: Tensor, k: int) -> Tensor:
        gram = gram_matrix(unit) if unit.shape[1] <= GRAM_LIMIT else None
        return marginal_relevance(unit, score, k, balance=self.balance, gram=gram)
