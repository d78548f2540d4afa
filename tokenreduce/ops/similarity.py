"""Cosine geometry."""

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens

#: Shorter vectors are divided by this instead of their norm, so that zero vectors stay zero and
#: their similarity to everything is 0.
SMALLEST_NORM = 1e-8

#: Rows of a Gram matrix that are computed at a time, from the diagonal on.
GRAM_ROWS = 256


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


def gram_matrix(features: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Inner products of all pairs, about half of them computed: the matrix is symmetric.

    Args:
        features: ``(B, N, D)`` float32, detached.
        out: ``(B, N, N)``, where the products go; a new tensor if omitted.

    Returns:
        ``(B, N, N)``.
    """
    n = features.shape[1]
    if n < 2 * GRAM_ROWS or features.is_cuda:
        gram = features @ features.mT
        return gram if out is None else out.copy_(gram)
    gram = features.new_empty(features.shape[0], n, n) if out is None else out
    for item, products in zip(features, gram, strict=True):
        for begin in range(0, n, GRAM_ROWS):
            end = min(begin + GRAM_ROWS, n)
            torch.mm(item[begin:end], item[begin:].T, out=products[begin:end, begin:])
            products[end:, begin:end] = products[begin:end, end:].T
    return gram


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
