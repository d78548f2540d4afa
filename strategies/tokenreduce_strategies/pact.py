"""Drops tokens of small states, and clusters the others around dense keys, none too far away.

Idea: pruning by importance loses what is unique, merging blurs what is important. Do the one for
clearly unimportant tokens and the other for duplicates: clusters whose radius is bounded, so that
tokens merge only with what they resemble.

Algorithm, after a layer of the LLM (the fourth), with keys c_i (all heads side by side) and
d(i, j) = 1 - cos(c_i, c_j):
    1. the share ``important`` of the tokens of largest hidden state (L2 norm) are candidates, and
       no fewer than the budget;
    2. density of a candidate: sum over candidates j of exp(-(d(i, j) / 2)^2);
    3. by falling density, each candidate that lies within ``radius`` of no centre becomes a centre.
       With a budget of k: the first k of them; if there are fewer, the candidates farthest from
       any centre follow, one by one;
    4. candidates join the nearest centre; the tokens put aside in step 1 join theirs if it lies
       within 1.5 ``radius``, or else are dropped. Candidates farther than that, which a budget can
       leave, are dropped likewise;
    5. each cluster becomes the size-weighted mean of its hidden states, at the place of its centre.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)`` -> merged ``(B, k, D)``. Cost: O(N^2 C) for the
Gram matrix of the keys, then O(k N). Above 16384 tokens it refuses.

Deviations from the official code: importance is the norm alone, which it has as an option; by
default it multiplies the norm by attention to the mean query, and queries are no signal. Attention
over merged tokens is not corrected by log size: the LLM stays as it is. Batches; ties go to the
lowest index (there, tokens of the same density may all become centres). With importance by norm,
tokens and features equal those of the official code on recorded cases.

Published: no comparable table.

```bibtex
@inproceedings{dhouib2025pact,
  title={{PACT}: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models},
  author={Dhouib, Mohamed and Buscaldi, Davide and Vanier, Sonia and Shabou, Aymen},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  eprint={2504.08966},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError
from tokenreduce.ops import TIE_TOLERANCE, first_argmax, gram_matrix, top_k_indices, unit_vectors
from tokenreduce.ops.limits import require_matrix
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.remainders import common_count

#: Rows of the distances whose densities are computed at a time.
ROWS = 128
#: How much farther than the radius a token may join a centre.
REACH = 1.5


def bounded_centres(distance: Tensor, candidates: Tensor, radius: float, k: int | None) -> Tensor:
    """Steps 2 and 3 for one item.

    Args:
        distance: ``(N, N)``.
        candidates: ``(N,)`` booleans.
        radius: within which a centre keeps others from being one.
        k: how many centres; as many as it takes if None.

    Returns:
        ``(k,)`` indices, in the order they were picked.
    """
    likely = candidates.float()
    # Row by row of tiles, so that the matrix has no second copy.
    tiles = (part.square().div_(-4).exp_() for part in distance.split(ROWS))
    density = torch.cat([tile @ likely for tile in tiles])
    # Candidates that no centre covers come before all others, whose distances lie in [0, 2].
    rank = (3 + density / density.amax()).masked_fill(~candidates, -torch.inf)
    near = torch.full_like(rank, 2.0)
    picks: list[Tensor] = []
    while k is None or len(picks) < k:
        value = torch.where(near > radius + TIE_TOLERANCE, rank, near) if picks else rank
        value = value.masked_fill(~candidates, -torch.inf)
        newest = first_argmax(value, scale=1.0)
        if k is None and value[newest] <= 2:
            break
        picks.append(newest)
        candidates = candidates.index_fill(0, newest, False)
        near = torch.minimum(near, distance[newest])
    return torch.stack(picks)


@dataclass(frozen=True, kw_only=True)
class PACT(Reducer):
    """Drops tokens of small hidden states, and clusters the others by keys.

    Args:
        radius: largest cosine distance of a token to its centre, in (0, 2].
        important: share of the tokens that are candidates, in (0, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    adaptive: ClassVar[bool] = True

    radius: float = 0.21
    important: float = 0.55

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.radius <= 2:
            raise PipelineError(f"{self.name}: radius={self.radius} must lie in (0, 2].")
        if not 0 < self.important <= 1:
            raise PipelineError(f"{self.name}: important={self.important} must lie in (0, 1].")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.budget is None else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        n = tokens.count
        require_matrix(n, "clusters of keys")
        k = None if self.budget is None else self.count(n)
        norm = tokens.features.detach().float().norm(dim=2)
        likely = top_k_indices(norm, max(k or 1, int(self.important * n + 0.5)))
        candidates = torch.zeros_like(norm, dtype=torch.bool).scatter(1, likely, True)
        unit = unit_vectors(tokens.signal("decoder_keys").detach())
        found = [self._cluster(*item, k) for item in zip(unit, candidates, strict=True)]
        common_count(torch.tensor([len(centres) for _, centres in found]), strategy=self.name)
        groups, positions = (torch.stack(part) for part in zip(*found, strict=True))
        return Reduction.from_groups(tokens, groups, positions.shape[1], positions=positions)

    def _cluster(self, unit: Tensor, candidates: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
        """For one item: the group of each token, and where the groups stand."""
        distance = gram_matrix(unit[None])[0].neg_().add_(1).clamp_(min=0).fill_diagonal_(0)
        centres = bounded_centres(distance, candidates, self.radius, k).sort().values
        nearness = distance[:, centres].neg_()
        groups = first_argmax(nearness, scale=1.0)
        reach = REACH * self.radius + TIE_TOLERANCE
        groups = torch.where(nearness.amax(1) >= -reach, groups, DROPPED)
        own = torch.arange(len(centres), device=unit.device)
        return groups.index_copy(0, centres, own), centres
