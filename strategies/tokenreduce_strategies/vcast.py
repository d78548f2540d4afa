"""V-CAST: more tokens where the video turns; in each frame, what stands out from its mean.

Idea: the frames of a video are points of a path. Where the path is straight, neighbours say the
same; where it bends, something happens, and frames deserve more tokens. In a frame, tokens far from
the mean of the frame and tokens of large norm carry what is particular to it.

Algorithm, for T frames of P tokens x[t, p] and a budget of k:
    1. e_t is the mean token of frame t, scaled to unit length; the curvature is
       c_t = |e_{t+1} - 2 e_t + e_{t-1}|, where the video stands still before and after its ends;
    2. every frame gets one token, and the rest of k in proportion to softmax_t(c_t), at most P;
       fractions by largest remainder;
    3. the score of a token is 1 - cos(x[t, p], e_t) + (|x[t, p]| - min) / (max - min), with the
       smallest and the largest norm in its frame; each frame keeps its tokens of highest score.
Output in source order. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> scores ``(B, T, P)`` and counts ``(B, T)`` -> kept
``(B, k, D)``. Cost: O(N D).

Written from a description: budgets by a softmax of the curvature of frame means, scores by the sum
above. How curvature is measured (on unit vectors, by the second difference) and the ends are
free choices; so is the rule for fractions. Equality with the official code was not tested.

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

from tokenreduce.ops import TIE_TOLERANCE, unit_vectors
from tokenreduce.ops.quotas import apportion, kept_indices, top_mask
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class VCAST(Selector):
    """Keeps what stands out in its frame, more where the video turns."""

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """Indices of the kept tokens, ``(B, k)``.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        clip = tokens.features.detach().unflatten(1, (frames, places))
        units = unit_vectors(clip.mean(2, dtype=torch.float32))
        counts = apportion(curvature(units).softmax(1), k, places, least=1)
        return kept_indices(top_mask(salience(clip, units), counts, scale=1.0).flatten(1))


def curvature(units: Tensor) -> Tensor:
    """Step 1: ``(B, T)`` of the unit frame means ``(B, T, D)``."""
    before = torch.cat([units[:, :1], units[:, :-1]], dim=1)
    after = torch.cat([units[:, 1:], units[:, -1:]], dim=1)
    bend: Tensor = torch.linalg.vector_norm(after - 2 * units + before, dim=2)
    return bend


def salience(clip: Tensor, units: Tensor) -> Tensor:
    """Scores of step 3, ``(B, T, P)``, of tokens ``(B, T, P, D)``; frame by frame, in the cache."""
    scores = []
    for frame, unit in zip(clip.unbind(1), units.unbind(1), strict=True):
        tokens = frame.float()
        norm = torch.linalg.vector_norm(tokens, dim=2)
        cosine = torch.bmm(tokens, unit[..., None]).squeeze(2) / norm.clamp(min=SMALLEST_NORM)
        low, high = norm.amin(1, keepdim=True), norm.amax(1, keepdim=True)
        # Norms that differ by rounding errors alone are equal.
        spread = torch.where(high - low > 8 * TIE_TOLERANCE * high, high - low, torch.inf)
        scores.append(1 - cosine + (norm - low) / spread)
    return torch.stack(scores, dim=1)
