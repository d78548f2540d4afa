"""Exact search in tiles, so that no Q x K matrix is ever held."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax, top_k_indices
from tokenreduce.ops.similarity import directions, unit_vectors

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)

#: Entries of one tile of similarities: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24

#: Tokens, and earlier tokens, of the tiles in which earlier tokens are searched.
TILE_ROWS, TILE_COLUMNS = 512, 256


class ExactSearch:
    """See :class:`tokenreduce.neighbors.NeighborBackend`."""

    def nearest(
        self, queries: Tensor, keys: Tensor, k: int, *, metric: Metric, exclude_self: bool
    ) -> tuple[Tensor, Tensor]:
        """See :func:`tokenreduce.neighbors.nearest`."""
        return nearest_exact(queries, keys, k, metric=metric, exclude_self=exclude_self)

    def nearest_earlier(
        self, features: Tensor, rows: Tensor, asked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :func:`tokenreduce.neighbors.nearest_earlier`."""
        value = torch.full(rows.shape, -torch.inf, device=rows.device)
        index = torch.full_like(rows, -1)
        for start in range(0, len(asked), TILE_ROWS):
            tile = asked[start : start + TILE_ROWS]
            first, last = int(tile[0]), int(tile[-1])
            queries = directions(features[rows[tile]])
            for before in range(0, last, TILE_COLUMNS):
                places = torch.arange(before, min(last, before + TILE_COLUMNS), device=rows.device)
                cosine = queries @ directions(features[rows[places]]).T
                if before + TILE_COLUMNS > first:
                    cosine.masked_fill_(places >= tile[:, None], -torch.inf)
                found = first_argmax(cosine, scale=1.0)
                near = cosine.gather(1, found[:, None])[:, 0]
                found = (found + before).masked_fill(near == -torch.inf, -1)
                nearer(near, found, value, index, tile)
        return value, index


def earlier_within(unit: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The most similar earlier one of ``(n, D)`` unit vectors, whose places begin at ``start``."""
    cosine = unit @ unit.T
    cosine.masked_fill_(torch.ones_like(cosine, dtype=torch.bool).triu_(), -torch.inf)
    found = first_argmax(cosine, scale=1.0)
    value = cosine.gather(1, found[:, None])[:, 0]
    return value, (found + start).masked_fill(value == -torch.inf, -1)


def nearer(value: Tensor, index: Tensor, best: Tensor, where: Tensor, tile: slice | Tensor) -> None:
    """Note neighbours that are nearer than the best so far, or as near and earlier."""
    gain = value - best[tile]
    better = (gain > TIE_TOLERANCE) | ((gain >= -TIE_TOLERANCE) & (index < where[tile]))
    best[tile] = torch.where(better, value, best[tile])
    where[tile] = torch.where(better, index, where[tile])


def nearest_exact(
    queries: Tensor, keys: Tensor, k: int, *, metric: Metric, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """See :func:`tokenreduce.neighbors.nearest`."""
    cosine = metric == "cosine"
    if cosine:
        queries, keys = unit_vectors(queries), unit_vectors(keys)
    else:
        queries, keys = queries.float(), keys.float()
        half_squares = keys.square().sum(-1)[:, None] / 2
    batch, count, _ = queries.shape
    rows = max(1, TILE_ENTRIES // max(1, batch * keys.shape[1]))
    item = torch.arange(batch, device=keys.device)[:, None, None]
    values, indices = [], []
    for start in range(0, max(count, 1), rows):
        tile = queries[:, start : start + rows]
        score = tile @ keys.transpose(1, 2)
        if not cosine:
            score -= half_squares
        if exclude_self:
            own = torch.arange(start, start + tile.shape[1], device=keys.device)
            score[:, own - start, own] = -torch.inf
        # Rounding errors are relative to the terms of a score, not to what is left of them.
        scale = 1.0 if cosine else tile.square().sum(-1, keepdim=True)
        if k == 1:
            found = first_argmax(score, scale=scale)[..., None]
        else:
            found = top_k_indices(score, k, scale=scale)
        if cosine:
            value = score.gather(2, found)
        else:
            # The product form cancels badly for near-duplicates: measure those found again.
            value = -(tile[:, :, None] - keys[item, found]).norm(dim=-1)
        order = value.argsort(dim=-1, descending=True, stable=True)
        values.append(value.gather(2, order))
        indices.append(found.gather(2, order))
    value = torch.cat(values, dim=1)
    return (value if cosine else -value), torch.cat(indices, dim=1)
