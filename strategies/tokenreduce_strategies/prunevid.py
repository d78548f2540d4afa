"""PruneVid, part before the LLM: still places merge over time, then similar tokens in space.

Idea: within a scene, the background stands still and one token a place says it all; what moves is
kept frame by frame. In both, similar patches of a frame are then clustered.

Algorithm, for T frames of P tokens x[t, p] and a budget of k:
    1. scenes: cluster the frames' mean tokens by density peaks into round(``segments`` T) clusters;
       a run of frames of one cluster is a scene;
    2. a place is still in a scene of several frames if the mean cosine of all pairs of its tokens
       reaches ``tau``; it becomes its mean over time, at the scene's first frame. All other tokens
       are dynamic. If fewer than k tokens are left, the least alike still places are dissolved
       until there are k;
    3. sets: the still tokens of each scene, and the dynamic tokens of each frame. Each set keeps
       one token if k allows, and a share of the rest in proportion to its tokens (largest
       remainder);
    4. each set is clustered to its share by density peaks (7 neighbours); a cluster becomes the
       plain mean of its tokens, at the place of its centre.
Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> scenes, clusters -> ``(B, k, D)``. Cost: O(N P D), linear in
frames but for the T x T distances of the frames' means.

Written from the paper's description, with its settings as defaults. Free choices: the count is
exact (the paper keeps half of each set, which ``keep_ratio`` of what step 2 leaves would be); how
still is measured where a scene is one frame (it has no still places). Equality with the official
code was not tested. Its second part, pruning inside the LLM by attention to the question, is not
part of this strategy.

Published: no comparable table.

```bibtex
@inproceedings{huang2025prunevid,
  title={{PruneVid}: Visual Token Pruning for Efficient Video Large Language Models},
  author={Huang, Xiaohu and Zhou, Hao and Han, Kai},
  booktitle={Findings of the Association for Computational Linguistics: ACL 2025},
  year={2025},
  eprint={2412.16117},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import unit_vectors
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.quotas import apportion
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.reduction import DROPPED
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.holitom import dissolve


@dataclass(frozen=True, kw_only=True)
class PruneVid(Merger):
    """Merges still places of scenes over time, and similar tokens in space.

    Args:
        segments: clusters of frames, as a share of the frames, in (0, 1].
        tau: mean cosine from which a place is still, in [-1, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    segments: float = 0.25
    tau: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.segments <= 1:
            raise PipelineError(f"prunevid: segments={self.segments} lies in (0, 1].")
        if not -1 <= self.tau <= 1:
            raise PipelineError(f"prunevid: tau={self.tau} is a cosine, in [-1, 1].")

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        """Group the tokens.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        shape = (tokens.require_grid(self.name)[0], -1)
        items = [
            self._item(clip.float().unflatten(0, shape), k) for clip in tokens.features.detach()
        ]
        groups, positions, weights = (torch.stack(part) for part in zip(*items, strict=True))
        return Grouping(groups, positions, weights)

    def _item(self, clip: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """For one clip ``(T, P, D)``: groups, positions and weights."""
        frames, places, _ = clip.shape
        n = frames * places
        own = torch.arange(n, device=clip.device).reshape(frames, places)
        scene = scenes(clip.mean(1), max(1, int(self.segments * frames + 0.5)))
        lengths = torch.bincount(scene)
        count = len(lengths)
        first = own[lengths.cumsum(0) - lengths, 0]
        alike = mean_cosine(clip, scene, lengths)
        still = (alike >= self.tau) & (lengths > 1)[:, None]
        still = dissolve(still, alike, lengths, n, k)
        dynamic = ~still[scene]
        sets = torch.cat([still.sum(1), dynamic.sum(1)])
        counts = apportion((sets - 1).clamp(min=0).float(), k, sets, least=1)
        totals = clip.new_zeros(count, places, clip.shape[2]).index_add_(0, scene, clip)
        means = totals / lengths[:, None, None]
        merged, shares = _clusters(means, counts[:count], still, first)
        kept, others = _clusters(clip, counts[count:], dynamic, own[:, 0])
        where = torch.where(dynamic, kept, merged[scene]).flatten()
        weights = torch.where(dynamic, others, (shares / lengths[:, None])[scene]).flatten()
        positions = (where == own.flatten()).nonzero().squeeze(1)
        groups = torch.where(where < 0, DROPPED, torch.searchsorted(positions, where))
        return groups, positions, weights


def scenes(means: Tensor, clusters: int) -> Tensor:
    """Step 1: ``(T,)`` the scene of each frame, from the frames' means ``(T, D)``."""
    peaks = density_peaks(means[None], torch.tensor([clusters]))
    changes = peaks.centre_of[0].diff() != 0
    return torch.nn.functional.pad(changes.long().cumsum(0), (1, 0))


def mean_cosine(clip: Tensor, scene: Tensor, lengths: Tensor) -> Tensor:
    """``(S, P)`` mean cosine of all pairs of tokens that a place has in a scene; 1 for one frame.

    Args:
        clip: ``(T, P, D)``.
        scene: ``(T,)`` the scene of each frame.
        lengths: ``(S,)`` frames of each scene.
    """
    units = unit_vectors(clip)
    total = units.new_zeros(len(lengths), *clip.shape[1:]).index_add_(0, scene, units)
    # A zero vector is like nothing, itself included.
    alone = units.square().sum(2)
    own = alone.new_zeros(len(lengths), clip.shape[1]).index_add_(0, scene, alone)
    pairs = (lengths * (lengths - 1))[:, None]
    return torch.where(pairs > 0, (total.square().sum(2) - own) / pairs.clamp(min=1), 1)


def _clusters(
    features: Tensor, counts: Tensor, takes_part: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Step 4: the token that each one's cluster stands at, and its weight there, ``(S, P)``."""
    peaks = density_peaks(features, counts, takes_part=takes_part)
    joins = (counts > 0)[:, None] & takes_part
    centre = peaks.centre_of.clamp(min=0)
    members = torch.zeros_like(features[..., 0]).scatter_add(1, centre, joins.float())
    weights = 1 / members.gather(1, centre).clamp(min=1)
    return torch.where(joins, first[:, None] + centre, DROPPED), weights
