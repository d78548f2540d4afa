"""Cosine geometry."""

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens

#: Shorter vectors are divided by this instead of their norm, so that zero vectors stay zero and
#: their similarity to everything is 0.
SMALLEST_NORM = 1e-8


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
