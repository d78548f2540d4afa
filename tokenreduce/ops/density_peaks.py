"""Clustering by density peaks (Rodriguez and Laio, Science 2014; DPC-kNN: Du et al., 2016)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops.limits import require_matrix
from tokenreduce.ops.quotas import top_mask
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import gram_matrix

#: Squared distances below this part of the squared lengths are rounding errors of a duplicate.
DUPLICATE = 4e-6
#: Densities nearer than this are ties; densities lie in (0, 1].
DENSITY_TOLERANCE = 1e-6
#: Entries of the distance matrices held at a time: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24
#: Entries that are worked on at a time: 512 Ki float32 values, 2 MiB, which fit the cache.
CACHED_ENTRIES = 1 << 19


class DensityPeaks(NamedTuple):
    """Cluster centres, and where each token belongs.

    Attributes:
        centres: ``(B, n)`` booleans.
        centre_of: ``(B, n)`` index of each token's centre, a centre's own for itself; -1 for
            tokens that take no part.
    """

    centres: Tensor
    centre_of: Tensor


def density_peaks(
    features: Tensor, clusters: Tensor, *, neighbors: int = 7, takes_part: Tensor | None = None
) -> DensityPeaks:
    """Cluster tokens around those that are dense and far from anything denser.

    With Euclidean distances d divided by sqrt(D): the density of a token is exp(-mean d^2) over its
    q nearest tokens, itself included; its score is its density times the distance to the nearest
    denser token (the densest: the largest distance of all). The tokens of highest score are
    centres; the others join the nearest. Of equal densities the first token counts as denser; other
    ties go to the lowest index as well.

    Args:
        features: ``(B, n, D)``.
        clusters: ``(B,)`` integers, how many centres each item gets, at most its tokens.
        neighbors: q, at most; no more than the item has clusters.
        takes_part: ``(B, n)`` booleans, tokens to cluster; all if omitted.

    Returns:
        centres and assignment. Memory beside the features: bounded, n x n for a single item.

    Raises:
        TokensError: if n is too large for a matrix of that size.
    """
    batch, n, _ = features.shape
    require_matrix(n, "density peaks")
    if takes_part is None:
        takes_part = torch.ones(batch, n, dtype=torch.bool, device=features.device)
    together = max(1, TILE_ENTRIES // n**2)
    parts = [
        _cluster(*part, neighbors)
        for part in zip(
            features.split(together),
            clusters.to(features.device).split(together),
            takes_part.split(together),
            strict=True,
        )
    ]
    centres, centre_of = zip(*parts, strict=True)
    return DensityPeaks(torch.cat(centres), torch.cat(centre_of))


def _cluster(
    features: Tensor, clusters: Tensor, takes_part: Tensor, neighbors: int
) -> tuple[Tensor, Tensor]:
    batch, n, _ = features.shape
    distance = _distances(features)
    rows = max(1, CACHED_ENTRIES // (batch * n))
    tiles = distance.split(rows, dim=1)
    index = torch.arange(n, device=features.device)
    out = ~takes_part
    q = torch.minimum(clusters, takes_part.sum(1)).clamp(1, neighbors)[:, None, None]
    rank = torch.arange(min(neighbors, n), device=features.device)
    nearest, farthest = [], []
    for tile in tiles:
        farthest.append(tile.masked_fill(out[:, None], 0).amax(2))
        tile.masked_fill_(out[:, None], torch.inf)
        closest = tile.topk(len(rank), dim=2, largest=False).values.square()
        nearest.append(closest.masked_fill(rank >= q, 0).sum(2))
    density = (-torch.cat(nearest, dim=1) / q[:, 0]).exp().masked_fill(out, -1)
    largest = torch.cat(farthest, dim=1).masked_fill(out, 0).amax(1, keepdim=True)
    apart = torch.cat(
        [
            torch.where(_denser(density, own), tile, torch.inf).amin(2)
            for tile, own in zip(tiles, index.split(rows), strict=True)
        ],
        dim=1,
    )
    score = density * torch.where(apart.isinf(), largest, apart)
    centres = top_mask(score.masked_fill(out, -torch.inf), clusters, scale=largest)
    # Where there are no centres, every distance is infinite and the answer is never read.
    joins = torch.cat(
        [
            first_argmax(
                tile.neg().masked_fill_(~centres[:, None], -torch.inf), scale=largest[..., None]
            )
            for tile in tiles
        ],
        dim=1,
    )
    return centres, torch.where(centres, index, joins).masked_fill(out, -1)


def _denser(density: Tensor, rows: Tensor) -> Tensor:
    """``(B, r, n)`` which tokens are denser than those of the rows ``(r,)``."""
    ahead = density[:, None] - density[:, rows, None]
    index = torch.arange(density.shape[1], device=density.device)
    earlier = index < rows[:, None]
    return (ahead > DENSITY_TOLERANCE) | ((ahead.abs() <= DENSITY_TOLERANCE) & earlier)


def _distances(features: Tensor) -> Tensor:
    """``(B, n, n)`` Euclidean distances over sqrt(D), exactly 0 between duplicates."""
    centred = features.float() - features.float().mean(1, keepdim=True)
    squares = centred.square().sum(2)
    distance = gram_matrix(centred)
    # Not needed beside their products.
    del centred
    rows = max(1, CACHED_ENTRIES // (distance.shape[0] * distance.shape[1]))
    for tile, own in zip(distance.split(rows, dim=1), squares.split(rows, dim=1), strict=True):
        lengths = squares[:, None] + own[..., None]
        tile.mul_(-2).add_(lengths)
        tile.masked_fill_(tile <= DUPLICATE * lengths, 0).div_(features.shape[2]).sqrt_()
    return distance
