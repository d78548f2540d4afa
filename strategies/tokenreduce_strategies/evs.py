"""EVS: drops tokens that repeat the frame before.

Idea: in most videos a patch looks as it did a frame ago. Such a patch tells the LLM nothing new, so
keep the first frame whole, and of the others what changed.

Algorithm, for T frames of P places with tokens x[t, p] and a budget of k:
    1. the novelty of x[t, p], t >= 1, is 1 - cos(x[t, p], x[t-1, p]), against the original frame
       before, whether or not that one is kept;
    2. keep frame 0, and the k - P tokens of largest novelty among all others;
    3. with k < P: keep k tokens of frame 0 alone, at the places that ``uniform`` would choose.
Output in source order. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> novelty ``(B, T - 1, P)`` -> kept ``(B, k, D)``. Cost: O(N D),
no matrix of tokens by tokens.

Deviations from the official code (vLLM): it keeps at least one frame, max(P, int(N (1 - q))), so
that its count exceeds small budgets; ``official=True`` does likewise. Cosines in float32 under half
precision; novelties within 2.5e-7 are ties. Kept tokens equal those of the official code on
recorded cases.

Published: the abstract claims up to 4x faster time to first token; no comparable table.

```bibtex
@article{bagrov2025evs,
  title={Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster {VLM} Inference},
  author={Bagrov, Natan and Khvedchenia, Eugene and Tymchenko, Borys and Aharon, Shay and
          Kadoch, Lior and Keren, Tomer and Masad, Ofri and Geifman, Yonatan and
          Zilberstein, Ran and Rintamaki, Tuomas and Le, Matthieu and Tao, Andrew},
  journal={arXiv preprint arXiv:2510.14624},
  year={2025}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.ops import top_k_indices
from tokenreduce.ops.frames import previous_cosine
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.official import stated_ratio
from tokenreduce_strategies.uniform import Uniform


@dataclass(frozen=True, kw_only=True)
class EVS(Reducer):
    """Keeps the first frame, and what changes from frame to frame.

    Args:
        official: keep at least one frame, as the official code does, though the budget be less.
    """

    official: bool = False

    @property
    def count_class(self) -> CountClass:
        return "layout" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the first frame and the most novel tokens.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        frames, height, width = tokens.require_grid(self.name)
        n, places = tokens.count, height * width
        k = self.count(n)
        if self.official:
            # Twice from one: the official ratio is what is dropped, a difference in floats.
            k = max(places, int(n * (1 - (1 - stated_ratio(self, n)))))
        return Reduction.from_kept(tokens, _most_novel(tokens, frames, places, k))


def _most_novel(tokens: VisualTokens, frames: int, places: int, k: int) -> Tensor:
    """``(B, k)`` indices, the first frame before all others."""
    first = torch.arange(places, device=tokens.features.device)
    if k < places:
        return Uniform().select(tokens.select(first), k)
    clip = tokens.features.detach().unflatten(1, (frames, places))
    novelty = (1 - previous_cosine(clip)).flatten(1)
    changed = places + top_k_indices(novelty, k - places, scale=1.0)
    return torch.cat([first.expand(tokens.batch, -1), changed], dim=1)
