"""V-CAST: more tokens where the video turns; in each frame, what stands out from its mean.

Idea: the frames of a video are points of a path. Where the path is straight, neighbours say the
same; where it bends, something happens, and frames deserve more tokens. In a frame, tokens far from
the mean of the frame and tokens of large norm carry what is particular to it.

Algorithm, for T frames of P tokens x[t, p] and a budget of k:
    1. e_t is the mean token of frame t, scaled to unit length; the curvature is
       c_t = 1 - cos(e_t - e_{t-1}, e_{t+1} - e_t), and 1 at both ends and where a step is 0;
    2. every frame gets one token, and the rest of k in proportion to softmax_t(c_t /
       ``temperature``), at most P; fractions by largest remainder;
    3. the score of a token is 1 - cos(x[t, p], e_t) + (|x[t, p]| - min) / (max - min), with the
       smallest and the largest norm in its frame; each frame keeps its tokens of highest score.
Output in source order. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> scores ``(B, T, P)`` and counts ``(B, T)`` -> kept
``(B, k, D)``. Cost: O(N D).

Deviations from the official code: what rounding down leaves over goes to the frames of largest
remainder, one token each; there the frame of largest remainder takes tokens until it is full, then
the next (``official=True``). Steps shorter than 1e-6 count as none. Written from a description, its
``official`` path too; not compared on recorded cases.

Published: 98.6 percent of the full Qwen3-VL-8B, latency 86.4 percent of it (its abstract).

```bibtex
@article{lin2026vcast,
  title={{V-CAST}: Video Curvature-Aware Spatio-Temporal Pruning for Efficient Video Large Language
         Models},
  author={Lin, Xinying and Liu, Xuyang and Wang, Yiyu and Ma, Teng and Ren, Wenqi},
  journal={arXiv preprint arXiv:2603.27650},
  year={2026}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError
from tokenreduce.ops import TIE_TOLERANCE, unit_vectors
from tokenreduce.ops.quotas import apportion, kept_indices, top_mask
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.official import stated_ratio

#: Steps between unit vectors shorter than this are rounding: they have no direction.
SHORTEST_STEP = 1e-6
#: Entries that are worked on at a time: 1 Mi float32 values, 4 MiB.
CACHED_ENTRIES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class VCAST(Reducer):
    """Keeps what stands out in its frame, more where the video turns.

    Args:
        temperature: of the softmax by which frames share the budget, positive.
        official: round as the official code does: half to even, and at least a token of each frame.

    Raises:
        PipelineError: if ``temperature`` is out of range.
    """

    temperature: float = 0.7
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise PipelineError(
                f"{self.name}: temperature={self.temperature} must be positive and finite."
            )

    @property
    def count_class(self) -> CountClass:
        return "layout" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the tokens that stand out.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        clip = tokens.features.detach().unflatten(1, (frames, places))
        units = unit_vectors(clip.mean(2, dtype=torch.float32))
        weights = (curvature(units) / self.temperature).softmax(1)
        if self.official:
            k = max(frames, round(stated_ratio(self, tokens.count) * tokens.count))
            counts = official_counts(weights, k, places)
        else:
            counts = apportion(weights, self.count(tokens.count), places, least=1)
        mask = top_mask(salience(clip, units), counts, scale=1.0)
        return Reduction.from_kept(tokens, kept_indices(mask.flatten(1)))


def curvature(units: Tensor) -> Tensor:
    """Step 1: ``(B, T)`` of the unit frame means ``(B, T, D)``."""
    steps = units.diff(dim=1)
    length = torch.linalg.vector_norm(steps, dim=2, keepdim=True)
    steps = torch.where(length > SHORTEST_STEP, steps / length.clamp(min=SHORTEST_STEP), 0)
    bend = units.new_ones(units.shape[:2])
    bend[:, 1:-1] = 1 - (steps[:, :-1] * steps[:, 1:]).sum(2)
    return bend


def official_counts(weights: Tensor, k: int, places: int) -> Tensor:
    """``(B, T)`` tokens of each frame, from weights ``(B, T)``; T <= k <= T places."""
    exact = weights * (k - weights.shape[1])
    whole = exact.floor()
    counts = (1 + whole.long()).clamp(max=places)
    order = (exact - whole).argsort(dim=1, descending=True, stable=True)
    room = (places - counts).gather(1, order)
    left = k - counts.sum(1, keepdim=True)
    grants = torch.minimum(room, (left - room.cumsum(1) + room).clamp(min=0))
    return counts.scatter_add(1, order, grants)


def salience(clip: Tensor, units: Tensor) -> Tensor:
    """Scores of step 3, ``(B, T, P)``, of tokens ``(B, T, P, D)``; a few frames at a time."""
    together = max(1, CACHED_ENTRIES // clip[:, 0].numel())
    norms, products = [], []
    for frames, unit in zip(clip.split(together, 1), units.split(together, 1), strict=True):
        tokens = frames.float()
        norms.append(torch.linalg.vector_norm(tokens, dim=3))
        products.append((unit[:, :, None] @ tokens.mT).squeeze(2))
    norm = torch.cat(norms, dim=1)
    cosine = torch.cat(products, dim=1) / norm.clamp(min=SMALLEST_NORM)
    low, high = norm.amin(2, keepdim=True), norm.amax(2, keepdim=True)
    # Norms that differ by rounding errors alone are equal.
    spread = torch.where(high - low > 8 * TIE_TOLERANCE * high, high - low, torch.inf)
    return 1 - cosine + (norm - low) / spread
