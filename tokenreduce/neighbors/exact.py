"""Exact search in tiles, so that no Q x K matrix is ever held."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tokenreduce.ops.selection import first_argmax, top_k_indices
from tokenreduce.ops.similarity import unit_vectors

Metric = Literal["cosine", "euclidean"]
METRICS: tuple[Metric, ...] = get_args(Metric)

#: Entries of one tile of similarities: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24


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
