"""Cosine geometry."""

import torch
from torch import Tensor

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
