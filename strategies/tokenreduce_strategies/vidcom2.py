"""VidCom2: keeps what is unusual in its frame and in the video, more of unusual frames.

Idea: a frame that resembles the video as a whole needs few tokens; within a frame, tokens near the
mean of the frame or of the video say little. Distances are taken on the channels that vary least,
where noise is smallest.

Algorithm, for T frames of P tokens and a budget of k:
    1. keep the floor(D / 2) channels of lowest variance over all tokens; scale the tokens to unit
       length on them: u[t, p];
    2. g(u, c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|u - c|^2 / (2 a)), the similarity to a
       centre: v[t, p] to the mean of all u, f[t, p] to the mean of frame t;
    3. frames: p = softmax over t of -mean_p(v[t, p]) / 0.01; frame t deserves 1 + p_t - 1 / T.
       Every frame gets one token, and the rest of k in proportion to that, at most P; fractions by
       largest remainder (with fewer tokens than frames, no frame has a claim to one);
    4. each frame keeps its tokens of lowest v + f.
Output in source order. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> scores ``(B, T, P)`` and counts ``(B, T)`` -> kept
``(B, k, D)``. Cost: O(N D).

Deviations from the official code: it gives frame t round(r P (1 + p_t - 1 / T)) tokens for a ratio
r, at least 1 and at most P, which misses the budget by a few; ``official=True`` does likewise, its
count depends on the data. With a single channel, that channel is kept. Float32 under half
precision; scores within 2.5e-7 of the largest are ties. Kept tokens equal those of the official
code on recorded cases.

Published: 99.6 percent of the full model at a quarter of the tokens, with 70.8 percent less time in
the LLM (its abstract); no comparable table.

```bibtex
@inproceedings{liu2025vidcom2,
  title={Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language
         Models},
  author={Liu, Xuyang and Wang, Yiyu and Ma, Junpeng and Zhang, Linfeng},
  booktitle={Proceedings of the Conference on Empirical Methods in Natural Language Processing},
  year={2025},
  eprint={2505.14454},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.ops import top_k_indices
from tokenreduce.ops.quotas import apportion, kept_indices, top_mask
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.official import stated_ratio

BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01

#: Variances below this part of the largest count as equal.
QUIETEST = 1e-10


class Commonness(NamedTuple):
    """How usual tokens and frames are.

    Attributes:
        tokens: ``(B, T, P)`` similarity to the centres of the video and of the frame, summed.
        frames: ``(B, T)`` what each frame deserves, 1 on average.
    """

    tokens: Tensor
    frames: Tensor


@dataclass(frozen=True, kw_only=True)
class VidCom2(Reducer):
    """Keeps tokens far from the centres of their frame and of the video.

    Args:
        official: round each frame's share by itself, as the official code does, so that the count
            differs from the budget by a few tokens.
    """

    official: bool = False

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep the least usual tokens.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        usual = commonness(tokens.features.detach().unflatten(1, (frames, places)))
        if self.official:
            share = (stated_ratio(self, tokens.count) * usual.frames).clamp(max=1)
            counts = (share * places).round().long().clamp(min=1)
        else:
            counts = apportion(usual.frames, self.count(tokens.count), places, least=1)
        kept = kept_indices(top_mask(-usual.tokens, counts).flatten(1))
        return Reduction.from_kept(tokens, kept)


def commonness(frames: Tensor) -> Commonness:
    """Steps 1 to 3: how usual the tokens of ``(B, T, P, D)`` are, and what each frame deserves.

    Frame by frame, since a frame fits the cache. Noisy channels are zeroed in the centres instead
    of being cut from the tokens, which would copy the clip.
    """
    clip = [frame.float() for frame in frames.unbind(1)]
    quiet = _quiet_channels(clip)
    norms = [torch.linalg.vector_norm(frame * quiet, dim=2) for frame in clip]
    scales = [1 / norm.clamp(min=SMALLEST_NORM) for norm in norms]
    means = [
        torch.bmm(scale[:, None], frame) * quiet / frame.shape[1]
        for frame, scale in zip(clip, scales, strict=True)
    ]
    whole = torch.stack(means).mean(0)
    similarities = []
    for frame, norm, scale, mean in zip(clip, norms, scales, means, strict=True):
        centres = torch.cat([whole, mean], dim=1)
        cosine = torch.bmm(frame, centres.transpose(1, 2)) * scale[..., None]
        squared = (norm * scale).square()[..., None] + centres.square().sum(2)[:, None]
        similarities.append(_gaussians(squared - 2 * cosine))
    to_video, to_frame = torch.stack(similarities, dim=1).unbind(3)
    unlike = -to_video.mean(2)
    # The largest is taken off before the division, as in the official code: shares near half a
    # token are rounded likewise.
    p = ((unlike - unlike.amax(1, keepdim=True)) / TEMPERATURE).softmax(1)
    return Commonness(to_video + to_frame, 1 + p - p.mean(1, keepdim=True))


def _quiet_channels(clip: list[Tensor]) -> Tensor:
    """``(B, 1, D)``: 1 for the half of the channels that varies least, 0 for the others."""
    mean = torch.stack([frame.mean(1, keepdim=True) for frame in clip]).mean(0)
    variance = torch.stack([(frame - mean).square().mean(1) for frame in clip]).mean(0)
    # Rounding errors of a variance go with itself, not with that of the loudest channel; below the
    # floor, channels are constant but for such errors.
    floor = QUIETEST * variance.amax(1, keepdim=True)
    level = variance.maximum(floor).clamp(min=torch.finfo(torch.float32).tiny).log()
    chosen = top_k_indices(-level, max(1, variance.shape[1] // 2))
    return torch.zeros_like(variance).scatter_(1, chosen, 1)[:, None]


def _gaussians(squared: Tensor) -> Tensor:
    """Sum of Gaussians of a squared distance."""
    return torch.stack([(-squared / (2 * a)).exp() for a in BANDWIDTHS]).sum(0)
