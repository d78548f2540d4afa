"""FastVID: salient tokens of each frame, and density peaks of some frames that gather the rest.

Idea: cut the clip into segments of similar frames. Within a segment, a few frames hold what the
others repeat: choose dense and distinct tokens of those as anchors, and merge the rest of the
segment into them. What the encoder attends to is kept as it is besides.

Algorithm, for T frames of P tokens x[t, p] with class attention a[t, p] and a budget of k:
    1. segments: cut between frames where the cosine of their mean tokens is below
       ``segment_threshold``, and at the ``min_segments`` - 1 lowest cosines in any case;
    2. shares: k is spread evenly over the frames; of a segment's share B, round(``context`` B) are
       anchors, the others salient tokens, spread evenly over its frames;
    3. salient tokens: those of largest class attention in their frame, kept as they are;
    4. anchors: every ``interval``-th frame of the segment, from its first, gets an even part of
       them (all frames do, where those cannot hold them), and gives its density peaks
       (7 neighbours) among the tokens that are not salient;
    5. every other token of the segment joins its most cosine-similar anchor; the output is ``beta``
       times the anchor plus 1 - beta times the mean of what joined it, at the anchor's place.
       A segment without anchors drops them. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> picks, anchors -> ``(B, k, D)``. Cost: O(N P D / interval) for
the anchors, O(N c D) to join c anchors in each segment.

Signal: ``class_attention``.

Written from a description, with the published settings as defaults. Free choices: the count is
exact, by steps 2 and 4; frames are compared by their mean tokens; anchors are chosen among the
tokens that are not salient. Equality with the official code was not tested.

Published, LLaVA-OneVision-7B, in percent of the full model: 98.0 at 8.3 percent of its FLOPs, with
a 7.1x faster prefill (its abstract); 98.3, 97.1 and 91.0 with 15, 10 and 5 percent of the tokens
(table of the InfoMerge paper).

```bibtex
@inproceedings{shen2025fastvid,
  title={{FastVID}: Dynamic Density Pruning for Fast Video Large Language Models},
  author={Shen, Leqi and Gong, Guoqiang and He, Tao and Zhang, Yifeng and Liu, Pengzhang and
          Zhao, Sicheng and Ding, Guiguang},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  eprint={2503.11187},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.neighbors import nearest
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.frames import segment_lengths
from tokenreduce.ops.quotas import apportion, top_mask
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.reduction import DROPPED
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastVID(Merger):
    """Keeps salient tokens, and merges the rest of each segment into density peaks.

    Args:
        segment_threshold: cosine of neighbouring frames' means below which a segment ends.
        min_segments: fewest segments, at least 1.
        context: share of the budget for anchors, in [0, 1].
        interval: distance of frames that give anchors, at least 1.
        beta: weight of an anchor in its output, in (0, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    segment_threshold: float = 0.9
    min_segments: int = 8
    context: float = 0.4
    interval: int = 4
    beta: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.segment_threshold <= 1:
            raise PipelineError(
                f"fastvid: segment_threshold={self.segment_threshold} is a cosine, in [-1, 1]."
            )
        for name in ("min_segments", "interval"):
            if getattr(self, name) < 1:
                raise PipelineError(f"fastvid: {name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.context <= 1:
            raise PipelineError(f"fastvid: context={self.context} lies in [0, 1].")
        if not 0 < self.beta <= 1:
            raise PipelineError(f"fastvid: beta={self.beta} lies in (0, 1].")

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        """Group the tokens.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        shape = (tokens.require_grid(self.name)[0], -1)
        # Rounding errors of attention are relative: beside one large value, small ones would tie.
        attention = tokens.signal("class_attention").detach().float()
        attention = attention.clamp(min=torch.finfo(torch.float32).tiny).log()
        items = [
            self._item(clip.float().unflatten(0, shape), each.unflatten(0, shape), k)
            for clip, each in zip(tokens.features.detach(), attention, strict=True)
        ]
        groups, positions, weights = (torch.stack(part) for part in zip(*items, strict=True))
        return Grouping(groups, positions, weights)

    def _item(self, clip: Tensor, attention: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """For one clip ``(T, P, D)`` with the logarithm of attention: groups, places, weights."""
        lengths = segment_lengths(clip.mean(1), self.segment_threshold, self.min_segments)
        salient_counts, anchor_counts = self.shares(lengths, clip.shape[1], k)
        salient = top_mask(attention, torch.tensor(salient_counts))
        counts = torch.tensor(anchor_counts, device=clip.device)
        anchors = torch.zeros_like(salient)
        giving = counts.nonzero().squeeze(1)
        if len(giving):
            free = ~salient[giving]
            anchors[giving] = density_peaks(clip[giving], counts[giving], takes_part=free).centres
        own = torch.arange(salient.numel(), device=clip.device).reshape(salient.shape)
        where = torch.where(salient | anchors, own, DROPPED)
        start = 0
        for length in lengths:
            frames = slice(start, start + length)
            chosen = own[frames][anchors[frames]]
            joining = own[frames][where[frames] < 0]
            if len(chosen) and len(joining):
                flat = clip.flatten(0, 1)
                closest = nearest(flat[joining][None], flat[chosen][None])[1].flatten()
                where.view(-1)[joining] = chosen[closest]
            start += length
        where, stands = where.flatten(), (salient | anchors).flatten()
        positions = stands.nonzero().squeeze(1)
        groups = torch.where(where < 0, DROPPED, torch.searchsorted(positions, where))
        size = torch.bincount(where.clamp(min=0), weights=where >= 0, minlength=len(where)).float()
        others = (size - 1)[where.clamp(min=0)]
        alone = torch.where(others > 0, self.beta, 1.0)
        weights = torch.where(stands, alone, (1 - self.beta) / others.clamp(min=1))
        return groups, positions, weights

    def shares(self, lengths: list[int], places: int, k: int) -> tuple[list[int], list[int]]:
        """Step 2, and the anchors' part of step 4: salient tokens and anchors of each frame.

        Args:
            lengths: frames of each segment.
            places: tokens of a frame.
            k: the budget.
        """
        frames = sum(lengths)
        salient: list[int] = []
        anchors: list[int] = []
        for length in lengths:
            start = len(salient)
            share = (start + length) * k // frames - start * k // frames
            context = int(self.context * share + 0.5)
            rest = share - context
            salient += [(t + 1) * rest // length - t * rest // length for t in range(length)]
            room = torch.tensor([places - count for count in salient[start:]])
            giving = torch.arange(length) % self.interval == 0
            if int(room[giving].sum()) < context:
                giving = torch.ones_like(giving)
            anchors += apportion(giving.float(), context, room * giving).tolist()
        return salient, anchors
