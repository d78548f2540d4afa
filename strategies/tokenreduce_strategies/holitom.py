"""HoliTom, part before the LLM: windows in which most places stand still, each place merged once.

Idea: cut the clip where that makes the most tokens redundant, judged over the whole clip and not
between neighbours alone. In each window, a place that stands still all along becomes one token;
what moves is thinned by attention, what stands still by clustering.

Algorithm, for T frames of P tokens x[t, p] with class attention a[t, p] and a budget of k:
    1. x[t, p] is still if cos(x[t, p], x[t+1, p]) > ``tau``. A window of frames s to e gains
       (e - s) tokens for each place that is still from s to e;
    2. choose the windows of 2 to ``max_window`` frames, and single frames between them, of largest
       total gain (dynamic programme; of equal ones, the later windows are the shorter);
    3. in each window, the places that are still become their mean over time, at its first frame;
       all other tokens are dynamic. If fewer than k tokens are left, the chains of places that are
       least alike at their weakest step are dissolved until there are k;
    4. sets: the still tokens of each window, and the dynamic tokens of each frame. Each set keeps
       one token if k allows, and a share of the rest in proportion to its tokens (largest
       remainder);
    5. of dynamic tokens, those of largest attention stay; still tokens are clustered by density
       peaks (``neighbors`` nearest). A cluster becomes ``beta`` times its centre plus 1 - beta
       times the mean of its other tokens, at the place of its centre.
Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> windows, clusters -> ``(B, k, D)``. Cost: O(N D) for the
windows, O(P^2 D) for each window's clusters, O(T^2) small integers for the dynamic programme.

Deviations from the official code: the count is exact (it keeps ceil(r n) dynamic tokens of each
frame and round(r n) still ones of each window, for a ratio r of what step 3 leaves, not of all
tokens; ``official=True`` does likewise); no random noise breaks ties; the branch that merges
dynamic tokens by similarity (D > 0), which fails there, is left out. Outputs equal those of the
official code on recorded cases. Its second part, merging inside the LLM, is not part of this
strategy.

Published, LLaVA-OneVision-7B, both parts together: 99.1 percent of the full model at 6.9 percent of
its FLOPs, 2.28x faster to the first token (its abstract).

```bibtex
@inproceedings{shao2025holitom,
  title={{HoliTom}: Holistic Token Merging for Fast Video Large Language Models},
  author={Shao, Kele and Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  eprint={2505.21334},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.frames import previous_cosine
from tokenreduce.ops.quotas import apportion, kept_indices, top_mask
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.official import stated_ratio


class Windows(NamedTuple):
    """How a clip is cut.

    Attributes:
        spans: first and last frame of each window, single frames included.
        gain: how many tokens are redundant by it.
    """

    spans: list[tuple[int, int]]
    gain: int


@dataclass(frozen=True, kw_only=True)
class HoliTom(Reducer):
    """Merges what stands still in windows of frames, and thins the rest by attention.

    Args:
        tau: cosine above which a token repeats the frame before, in [-1, 1].
        max_window: most frames of a window, at least 1.
        beta: weight of a centre in its cluster, in [0, 1].
        neighbors: how many nearest tokens the density is taken over, at least 1.
        official: count as the official code does.

    Raises:
        PipelineError: if an option is out of range.
    """

    tau: float = 0.8
    max_window: int = 1024
    beta: float = 0.6
    neighbors: int = 7
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau <= 1:
            raise PipelineError(f"holitom: tau={self.tau} is a cosine, in [-1, 1].")
        if not 0 <= self.beta <= 1:
            raise PipelineError(f"holitom: beta={self.beta} lies in [0, 1].")
        for name in ("max_window", "neighbors"):
            if getattr(self, name) < 1:
                raise PipelineError(f"holitom: {name}={getattr(self, name)} must be at least 1.")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Merge still tokens and thin dynamic ones.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        shape = (tokens.require_grid(self.name)[0], -1)
        # Rounding errors of attention are relative: beside one large value, small ones would tie.
        attention = tokens.signal("class_attention").detach().float()
        attention = attention.clamp(min=torch.finfo(torch.float32).tiny).log()
        items = [
            self._item(clip.unflatten(0, shape), each.unflatten(0, shape), tokens.count)
            for clip, each in zip(tokens.features.detach(), attention, strict=True)
        ]
        where, weights = (torch.stack(part).flatten(1) for part in zip(*items, strict=True))
        own = torch.arange(tokens.count, device=where.device)
        positions = kept_indices(where == own)
        groups = torch.searchsorted(positions, where)
        return Reduction.from_groups(
            tokens,
            torch.where(where < 0, DROPPED, groups),
            positions.shape[1],
            positions=positions,
            weights=weights,
        )

    def _item(self, clip: Tensor, attention: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """For one clip ``(T, P, D)``: where each token goes and its weight there, ``(T, P)``.

        Args:
            clip: ``(T, P, D)``.
            attention: ``(T, P)``, its logarithm.
            n: number of tokens.
        """
        frames, places = attention.shape
        own = torch.arange(n, device=clip.device).reshape(frames, places)
        cosine = previous_cosine(clip[None])[0]
        spans = static_windows(cosine > self.tau, self.max_window).spans
        first, last = (torch.tensor(side, device=clip.device) for side in zip(*spans, strict=True))
        lengths = last - first + 1
        window = torch.repeat_interleave(torch.arange(len(spans), device=clip.device), lengths)
        weakest = weakest_steps(cosine, window, len(spans))
        still = (weakest > self.tau) & (lengths > 1)[:, None]
        if not self.official:
            still = dissolve(still, weakest, lengths, n, self.count(n))
        dynamic = ~still[window]
        sets = torch.cat([still.sum(1), dynamic.sum(1)])
        if self.official:
            ratio = stated_ratio(self, n)
            kept = [round(int(size) * ratio) for size in sets[: len(spans)]]
            kept += [ceil(int(size) * ratio) for size in sets[len(spans) :]]
            if not any(kept):
                raise TokensError(
                    f"{self.name}: of {n} tokens, the official code keeps none on this budget "
                    f"({self.budget}). Use official=False."
                )
            counts = torch.tensor(kept, device=clip.device)
        else:
            spare = (sets - 1).clamp(min=0).float()
            counts = apportion(spare, self.count(n), sets, least=1)
        of_windows, of_frames = counts.split([len(spans), frames])
        salient = top_mask(attention.masked_fill(~dynamic, -torch.inf), of_frames)
        means = clip.new_zeros(still.shape + clip.shape[2:], dtype=torch.float32)
        means = means.index_add_(0, window, clip.float()) / lengths[:, None, None]
        peaks = density_peaks(means, of_windows, neighbors=self.neighbors, takes_part=still)
        centre_of = peaks.centre_of.masked_fill((of_windows == 0)[:, None] | ~still, DROPPED)
        cluster = torch.where(centre_of < 0, DROPPED, own[first, :1] + centre_of)
        where = torch.where(salient, own, DROPPED)
        where = torch.where(dynamic, where, cluster[window])
        share = _shares(centre_of, peaks.centres, self.beta) / lengths[:, None]
        return where, torch.where(dynamic, 1, share[window])


def static_windows(alike: Tensor, max_window: int) -> Windows:
    """Steps 1 and 2.

    Args:
        alike: ``(T - 1, P)`` booleans: does frame t + 1 repeat frame t at this place?
        max_window: most frames of a window.
    """
    frames = len(alike) + 1
    run = torch.zeros(alike.shape[1], dtype=torch.long, device=alike.device)
    # gains[t, l]: of a window that ends with frame t and began l frames before.
    gains = torch.zeros(frames, frames, dtype=torch.long, device=alike.device)
    for t in range(1, frames):
        run = (run + 1) * alike[t - 1]
        ended = torch.bincount(run, minlength=frames)
        gains[t] = ended.flip(0).cumsum(0).flip(0)
    gains = (gains * torch.arange(frames, device=alike.device)).cpu()
    best = torch.zeros(frames + 1, dtype=torch.long)
    back = []
    for t in range(frames):
        reach = min(t + 1, max_window)
        total = best[t - reach + 1 : t + 1].flip(0) + gains[t, :reach]
        best[t + 1] = total.amax()
        back.append(int((total == best[t + 1]).to(torch.uint8).argmax()))
    spans, end = [], frames - 1
    while end >= 0:
        spans.append((end - back[end], end))
        end -= back[end] + 1
    return Windows(spans[::-1], int(best[-1]))


def weakest_steps(cosine: Tensor, window: Tensor, count: int) -> Tensor:
    """``(W, P)`` the lowest cosine from frame to frame of each place in each window.

    Args:
        cosine: ``(T - 1, P)``.
        window: ``(T,)`` the window of each frame.
        count: number of windows, W.
    """
    inside = window[1:] == window[:-1]
    steps = cosine.masked_fill(~inside[:, None], torch.inf)
    least = torch.full((count, cosine.shape[1]), torch.inf, device=cosine.device)
    return least.scatter_reduce(0, window[1:, None].expand_as(steps), steps, "amin")


def dissolve(still: Tensor, weakest: Tensor, lengths: Tensor, n: int, k: int) -> Tensor:
    """The still places that are left when the least alike ones are dissolved to reach ``k``.

    Args:
        still: ``(W, P)`` booleans, places of windows that are merged over time.
        weakest: ``(W, P)`` how alike their tokens are.
        lengths: ``(W,)`` frames of each window.
        n: number of tokens.
        k: how many to have at least, at most n.
    """
    saved = (lengths - 1)[:, None].expand_as(weakest).flatten()
    order = weakest.masked_fill(~still, torch.inf).flatten().argsort(stable=True)
    saving = (saved * still.flatten())[order]
    left = n - saving.sum() + saving.cumsum(0)
    before = left - saving
    dissolved = torch.zeros_like(still).flatten()
    dissolved[order] = before < k
    return still & ~dissolved.reshape(still.shape)


def _shares(centre_of: Tensor, centres: Tensor, beta: float) -> Tensor:
    """``(W, P)`` the weight of each still token in its cluster."""
    target = centre_of.clamp(min=0)
    follows = ((centre_of >= 0) & ~centres).float()
    followers = torch.zeros_like(follows).scatter_add(1, target, follows).gather(1, target)
    alone = torch.where(followers > 0, beta, 1.0)
    return torch.where(centres, alone, (1 - beta) / followers.clamp(min=1))
