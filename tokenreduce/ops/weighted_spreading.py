"""Farthest-first traversal in which tokens carry weights: max-min diversity of salient tokens."""

import torch
from torch import Tensor

from tokenreduce.ops.limits import require_matrix
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import gram_matrix, unit_vectors

#: Entries of the Gram matrices held at a time: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24
#: Entries of features that are worked on at a time: 1 Mi float32 values, 4 MiB.
CACHED_ENTRIES = 1 << 20


def weighted_farthest_first(features: Tensor, weights: Tensor, k: int) -> Tensor:
    """Pick tokens one by one, each the farthest from those picked before in weighted distance.

    The weighted distance of a candidate j to a picked i is (1 - cos(i, j)) w_j. The first pick has
    the largest distance to its nearest other token.

    Args:
        features: ``(B, N, D)``.
        weights: ``(B, N)``.
        k: how many to pick, 0 <= k <= N.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index. Memory beside
        the features: bounded, N x N for a single item.

    Raises:
        TokensError: if N is too large for a matrix of that size.
    """
    require_matrix(features.shape[1], "weighted distances")
    together = max(1, TILE_ENTRIES // features.shape[1] ** 2)
    parts = zip(features.split(together), weights.float().split(together), strict=True)
    return torch.cat([_pick(part, weight, k) for part, weight in parts])


def _pick(features: Tensor, weights: Tensor, k: int) -> Tensor:
    batch, n, channels = features.shape
    picks = torch.empty((batch, k), dtype=torch.long, device=features.device)
    if k == 0:
        return picks
    rows = torch.arange(batch, device=features.device)
    # Row i holds the weighted distances of all candidates to i.
    apart = weights.new_empty(batch, n, n)
    together = max(1, CACHED_ENTRIES // (n * channels))
    nearest = []
    for part, tile, own in zip(
        *(whole.split(together) for whole in (features, apart, weights)), strict=True
    ):
        gram_matrix(unit_vectors(part), out=tile).neg_().add_(1).mul_(own[:, None])
        tile.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        nearest.append(tile.amin(1))
    errors = weights.abs()
    first = torch.cat(nearest).clamp(max=torch.finfo(torch.float32).max)
    newest = _farthest(first, errors)
    distance = torch.full_like(weights, torch.inf)
    for step in range(k):
        picks[:, step] = newest
        distance = torch.minimum(distance, apart[rows, newest])
        distance[rows, newest] = -torch.inf
        newest = _farthest(distance, errors)
    return picks


def _farthest(distance: Tensor, errors: Tensor) -> Tensor:
    """``(B,)`` the farthest candidates; each one's rounding error goes with its own weight.

    One magnitude for all, the largest weight, would take what differs by much for ties: attention
    is peaked.
    """
    leader = distance.argmax(1, keepdim=True)
    return first_argmax(distance, scale=torch.maximum(errors, errors.gather(1, leader)))
