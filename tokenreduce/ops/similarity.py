"""Cosine geometry."""

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens

#: Shorter vectors are divided by this instead of their norm, so that zero vectors stay zero and
#: their similarity to everything is 0.
SMALLEST_NORM = 1e-8

#: Entries that are worked on at a time: 256 Ki float32 values, 1 MiB.
CACHED_ENTRIES = 1 << 18
#: Rows of a Gram matrix that are computed at a time, from the diagonal on; fewer of a small one.
GRAM_ROWS, FEW_ROWS = 256, 128


def unit_vectors(features: Tensor) -> Tensor:
    """Features scaled to unit length, in float32.

    Args:
        features: ``(..., D)``.

    Returns:
        float32 of the same shape; zero vectors stay zero.
    """
    return torch.nn.functional.normalize(features.float(), dim=-1, eps=SMALLEST_NORM)


def directions(features: Tensor) -> Tensor:
    """Unit vectors; zero vectors, which have no direction, share one.

    Args:
        features: ``(..., D)``.

    Returns:
        float32 of the same shape.
    """
    features = features.float()
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    unit: Tensor = features / norm.clamp(min=SMALLEST_NORM)
    return unit.add_((norm == 0) * unit.shape[-1] ** -0.5)


def l1_norm(features: Tensor) -> Tensor:
    """Sum of magnitudes of each token, a few tokens at a time: no copy of the features is made.

    Args:
        features: ``(B, N, D)``, N > 0.

    Returns:
        ``(B, N)`` float32.
    """
    features = features.detach()
    batch, count, channels = features.shape
    together = min(count, max(1, CACHED_ENTRIES // (batch * channels)))
    magnitudes = features.new_empty(batch, together, channels)
    norm = features.new_empty((batch, count), dtype=torch.float32)
    parts = zip(features.split(together, dim=1), norm.split(together, dim=1), strict=True)
    for part, total in parts:
        own = torch.abs(part, out=magnitudes[:, : part.shape[1]])
        torch.sum(own, 2, dtype=torch.float32, out=total)
    return norm


def gram_matrix(features: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inner products of all pairs, about half of them computed: the matrix is symmetric.

    Args:
        features: ``(B, N, D)`` float32, detached.
        out: ``(B, N, N)``, where the products go; a new tensor if omitted.

    Returns:
        ``(B, N, N)``.
    """
    n = features.shape[1]
    if n < 2 * FEW_ROWS or features.is_cuda:
        return torch.matmul(features, features.mT, out=out)
    gram = features.new_empty(features.shape[0], n, n) if out is None else out
    rows = GRAM_ROWS if n >= 4 * GRAM_ROWS else FEW_ROWS
    for item, products in zip(features, gram, strict=True):
        for begin in range(0, n, rows):
            end = min(begin + rows, n)
            torch.mm(item[begin:end], item[begin:].T, out=products[begin:end, begin:])
            products[end:, begin:end] = products[begin:end, end:].T
    return gram


def closest_cosine(unit: Tensor) -> Tensor:
    """Cosine of each token with the one most similar to it, by rows of half the Gram matrix.

    Args:
        unit: ``(B, N, D)`` unit vectors, N > 1.

    Returns:
        ``(B, N)``.
    """
    closest = unit.new_full(unit.shape[:2], -torch.inf)
    for begin in range(0, unit.shape[1], GRAM_ROWS):
        tile = unit[:, begin : begin + GRAM_ROWS] @ unit[:, begin:].mT
        # A token is no neighbour of its own.
        tile.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        rows, columns = closest[:, begin : begin + GRAM_ROWS], closest[:, begin:]
        torch.maximum(rows, tile.amax(2), out=rows)
        torch.maximum(columns, tile.amax(1), out=columns)
    return closest


def similarity_to(unit: Tensor, index: Tensor, gram: Tensor | None) -> Tensor:
    """Cosine similarity of every token to one token of its item.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        index: ``(B,)`` the token of each item.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, N)``.
    """
    if gram is not None:
        return gather_tokens(gram, index[:, None]).squeeze(1)
    return torch.bmm(unit, gather_tokens(unit, index[:, None]).transpose(1, 2)).squeeze(2)
