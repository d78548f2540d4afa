"""Comparing the frames of a clip, place by place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenreduce.ops.similarity import SMALLEST_NORM


def same_place_cosine(frames: Tensor, reference: Sequence[int]) -> Tensor:
    """Cosine of each token with the token at the same place of another frame.

    Frame by frame, since a frame fits the cache and a clip does not: no copy of the clip is made.

    Args:
        frames: ``(B, T, P, D)``: T frames of P places.
        reference: for each frame, the frame to compare it with.

    Returns:
        ``(B, T, P)`` float32; 0 where one of the two is a zero vector.
    """
    norm = torch.linalg.vector_norm(frames, dim=-1, dtype=torch.float32).clamp(min=SMALLEST_NORM)
    dot = torch.stack(
        [
            (frames[:, t].float() * frames[:, other].float()).sum(-1)
            for t, other in enumerate(reference)
        ],
        dim=1,
    )
    cosine: Tensor = dot / norm / norm[:, list(reference)]
    return cosine


def previous_cosine(frames: Tensor) -> Tensor:
    """Cosine of each token with the one at the same place of the frame before.

    Args:
        frames: ``(B, T, P, D)``.

    Returns:
        ``(B, T - 1, P)`` float32, of the frames from the second on.
    """
    count = frames.shape[1]
    return same_place_cosine(frames, [max(t - 1, 0) for t in range(count)])[:, 1:]
