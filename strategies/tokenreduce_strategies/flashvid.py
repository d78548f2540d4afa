"""FlashVID: salient and diverse tokens of each frame, and trees of similar tokens along time.

Idea: in each frame, keep tokens that the encoder attends to and that differ from each other. What
is left repeats the frame before, though not at the same place: link every such token to the most
similar one a frame earlier, and merge the trees that these links form.

Algorithm, for T frames of P tokens x[t, p] with class attention a[t, p] and a budget of k:
    1. segments: cut between frames whose mean tokens have a cosine below ``segment_threshold``;
       with fewer than ``min_segments`` segments, cut at the lowest other cosines too;
    2. shares: k is spread evenly over the frames; of a frame's share b, ceil(``alpha`` b) go to
       step 3 and the rest to steps 4 and 5;
    3. attention and diversity: pick tokens of the frame one by one, the one of largest
       a_j min_i (1 - cos(i, j)) over the picked i; the first has the largest such distance to its
       nearest neighbour. They are kept as they are;
    4. trees, segment by segment, among the tokens not picked: link each token to the most
       cosine-similar one of the frame before if that exceeds ``temporal_threshold``; if that
       leaves fewer trees than their share, take only the most similar links. A tree becomes the
       mean of its tokens, at the place of its first;
    5. the segment's share is divided among its frames in proportion to their trees (largest
       remainder), and the trees of each frame are clustered to their part of it by density peaks
       (7 neighbours); a cluster becomes the plain mean of its trees, at the place of its centre.
Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> picks, trees, clusters -> ``(B, k, D)``. Cost: O(N P D), linear
in frames; two or three products of P x P in each frame.

Signal: ``class_attention``; none with ``selection="div"``.

Deviations from the official code: the count is exact (it rounds up in every frame); a tree becomes
its mean (it divides the sum over a tree by the number of the root's children plus one, which
inflates long chains: a still token seen in n frames comes out about n / 2 times as long); picked
tokens of a one-frame segment are not clustered again; no random noise breaks ties. The function
:func:`merge_segments` has an argument for its behaviour, and equals it on recorded cases. Its
second part, pruning inside the LLM after expanding the budget here, is not part of this strategy.

Published, LLaVA-OneVision-7B with 32 frames and 10 percent of the tokens: 99.1 percent of the full
model (a table of its authors, which has FastVID at 96.2 and VisionZip at 88.9).

```bibtex
@inproceedings{fan2026flashvid,
  title={{FlashVID}: Efficient Video Large Language Models via Training-free Tree-based
         Spatiotemporal Token Merging},
  author={Fan, Ziyang and Chen, Keyu and Xing, Ruilong and Li, Yulin and Jiang, Li and
          Tian, Zhuotao},
  booktitle={International Conference on Learning Representations},
  year={2026},
  eprint={2602.08024},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.frames import segment_lengths
from tokenreduce.ops.quotas import apportion, top_mask
from tokenreduce.ops.temporal_trees import nearest_in_frame_before, tree_means, tree_roots
from tokenreduce.ops.weighted_spreading import weighted_farthest_first
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.reduction import DROPPED
from tokenreduce.tokens import VisualTokens

Selection = Literal["attn_div", "attn_div_v2", "div"]


class MergedTokens(NamedTuple):
    """Where the tokens of a clip of T frames flow.

    Attributes:
        stands: ``(T * P,)`` the token at whose place each token's cluster stands, -1 for none.
        values: ``(T * P,)`` the weight of each token in its cluster.
    """

    stands: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class FlashVID(Merger):
    """Keeps salient diverse tokens, and merges the others along trees in time.

    Args:
        alpha: share of the budget for tokens that are kept as they are, in [0, 1].
        temporal_threshold: lowest cosine of a link, in [-1, 1].
        segment_threshold: cosine of neighbouring frames' means below which a segment ends.
        min_segments: fewest segments, at least 1.
        selection: what weighs the distance in step 3: ``"attn_div"`` class attention,
            ``"attn_div_v2"`` that times the product with the mean of the clip, ``"div"`` nothing.

    Raises:
        PipelineError: if an option is out of range.
    """

    alpha: float = 0.7
    temporal_threshold: float = 0.8
    segment_threshold: float = 0.9
    min_segments: int = 8
    selection: Selection = "attn_div"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PipelineError(f"flashvid: alpha={self.alpha} lies in [0, 1].")
        for name in ("temporal_threshold", "segment_threshold"):
            if not -1 <= (value := getattr(self, name)) <= 1:
                raise PipelineError(f"flashvid: {name}={value} is a cosine, in [-1, 1].")
        if self.min_segments < 1:
            raise PipelineError(f"flashvid: min_segments={self.min_segments} must be at least 1.")
        if self.selection not in get_args(Selection):
            raise PipelineError(
                f"flashvid: selection={self.selection!r} is not one of "
                f"{', '.join(get_args(Selection))}."
            )

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.selection == "div" else super().needs

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        """Group the tokens.

        Raises:
            TokensError: if the tokens do not form a full grid.
            MissingSignal: without class attention, where it is read.
        """
        count, height, width = tokens.require_grid(self.name)
        shape = (tokens.batch, count, height * width)
        clips = tokens.features.detach().float().reshape(*shape, -1)
        attention = torch.ones(shape, device=clips.device)
        if self.selection != "div":
            attention = tokens.signal("class_attention").detach().float().reshape(shape)
        shares = [(t + 1) * k // count - t * k // count for t in range(count)]
        picked = [ceil(self.alpha * share) for share in shares]
        trees = [share - picks for share, picks in zip(shares, picked, strict=True)]
        picks = salient_tokens(clips, attention, max(picked), self.selection)
        # Picks come in order of merit, so that a smaller share is a beginning of a larger one.
        within = torch.arange(max(picked)) < torch.tensor(picked)[:, None]
        within = within.to(clips.device).expand_as(picks)
        selected = torch.zeros(shape, dtype=torch.bool, device=clips.device)
        selected.scatter_(2, picks, within)
        items = [
            self._item(clip, chosen, trees) for clip, chosen in zip(clips, selected, strict=True)
        ]
        groups, positions, values = (torch.stack(part) for part in zip(*items, strict=True))
        return Grouping(groups, positions, values)

    def _item(
        self, clip: Tensor, selected: Tensor, trees: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps 4 and 5 for one clip ``(T, P, D)``: groups, positions and weights."""
        lengths = segment_lengths(clip.mean(1), self.segment_threshold, self.min_segments)
        ends = list(accumulate(lengths))
        keep = [sum(trees[end - n : end]) for end, n in zip(ends, lengths, strict=True)]
        merged = merge_segments(clip, selected, lengths, keep, threshold=self.temporal_threshold)
        own = torch.arange(selected.numel(), device=clip.device)
        where = torch.where(selected.flatten(), own, merged.stands)
        weights = torch.where(selected.flatten(), 1, merged.values)
        positions = (where == own).nonzero().squeeze(1)
        groups = torch.where(where < 0, DROPPED, torch.searchsorted(positions, where))
        return groups, positions, weights


def salient_tokens(clips: Tensor, attention: Tensor, k: int, selection: Selection) -> Tensor:
    """Step 3: ``(B, T, k)`` places of each frame in the order they were picked.

    Args:
        clips: ``(B, T, P, D)``.
        attention: ``(B, T, P)``.
        k: how many of each frame.
        selection: what weighs the distance.
    """
    weights = torch.ones_like(attention) if selection == "div" else attention
    if selection == "attn_div_v2":
        weights = weights * (clips * clips.mean((1, 2), keepdim=True)).sum(-1)
    picks = weighted_farthest_first(clips.flatten(0, 1), weights.flatten(0, 1), k)
    return picks.reshape(*attention.shape[:2], k)


def merge_segments(
    frames: Tensor,
    selected: Tensor,
    lengths: list[int],
    keep: list[int],
    *,
    threshold: float,
    official: bool = False,
) -> MergedTokens:
    """Steps 4 and 5, segment by segment.

    Args:
        frames: ``(T, P, D)`` float32.
        selected: ``(T, P)`` booleans, tokens that are kept as they are.
        lengths: how many frames each segment holds.
        keep: how many outputs the other tokens of each segment give, at most their number.
        threshold: lowest cosine of a link.
        official: count, weigh and choose as the official code does; then weights need not sum to
            one, counts miss ``keep``, and a selected token can join a cluster all the same.
    """
    count, places, _ = frames.shape
    own = torch.arange(count * places, device=frames.device).reshape(count, places)
    free = ~selected
    parent, linked = _links(frames, free, lengths, keep, threshold, official)
    roots = tree_roots(parent, linked)
    members = torch.bincount(roots, minlength=roots.numel()).float()
    if official:
        towards = (parent + own[:-1, :1])[linked]
        members = 1 + torch.bincount(towards, minlength=roots.numel()).float()
    stays = (roots == own.flatten()).reshape(count, places) & free
    if official:
        alone = [n == 1 for n in lengths for _ in range(n)]
        stays[torch.tensor(alone, device=stays.device)] = True
    clusters = torch.cat(
        [
            _shares(heads, most, places, official)
            for heads, most in zip(stays.sum(1).split(lengths), keep, strict=True)
        ]
    )
    # Where there are as many clusters as trees, each tree is a cluster.
    crowded = (clusters > 0) & (clusters < stays.sum(1))
    centre = torch.where(stays & (clusters > 0)[:, None], own, DROPPED)
    if bool(crowded.any()):
        trees = tree_means(frames, roots, members, crowded)
        peaks = density_peaks(trees, clusters[crowded], takes_part=stays[crowded])
        centre[crowded] = torch.where(
            stays[crowded], peaks.centre_of + own[crowded][:, :1], DROPPED
        )
    centre = centre.flatten()
    joined = torch.bincount(centre.clamp(min=0), weights=centre >= 0, minlength=centre.numel())
    stands = torch.where(stays.flatten()[roots], centre[roots], DROPPED)
    values = 1 / (members[roots] * joined[stands.clamp(min=0)].float())
    return MergedTokens(stands, values.masked_fill(stands < 0, 0))


def _shares(heads: Tensor, keep: int, places: int, official: bool) -> Tensor:
    """Clusters of each frame of a segment, ``(F,)``, for ``heads`` trees."""
    if official:
        ratio = keep / int(heads.sum())
        whole = [ceil(n * ratio) if ratio < 1 else n for n in heads.tolist()]
        return torch.tensor(whole, device=heads.device)
    return apportion(heads.float(), min(keep, int(heads.sum())), places)


def _links(
    frames: Tensor,
    free: Tensor,
    lengths: list[int],
    keep: list[int],
    threshold: float,
    official: bool,
) -> tuple[Tensor, Tensor]:
    """The place a frame before that each token of frames 1 to T - 1 leans on, and whether it does.

    Returns:
        parents and links, both ``(T - 1, P)``.
    """
    parent, nearest = nearest_in_frame_before(frames, free)
    linked = (nearest > threshold) & free[1:] & free[:-1].gather(1, parent)
    ends = list(accumulate(lengths))
    # Row t of the links leads from frame t + 1 to frame t.
    linked[[end - 1 for end in ends[:-1]]] = False
    links, room = linked.sum(1).tolist(), free.sum(1).tolist()
    for end, length, kept in zip(ends, lengths, keep, strict=True):
        start, most = end - length, sum(room[end - length : end]) - kept
        if sum(links[start : end - 1]) > most:
            # The official code compares strictly with the last link that it could take.
            allowed = torch.tensor(max(0, most - official), device=frames.device)
            own = linked[start : end - 1]
            scores = nearest[start : end - 1].masked_fill(~own, -torch.inf).flatten()
            own.copy_(top_mask(scores, allowed, scale=1.0).reshape(own.shape))
    return parent, linked
