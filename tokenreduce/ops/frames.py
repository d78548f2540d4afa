"""Comparing the frames of a clip, place by place or as wholes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenreduce.ops.quotas import top_mask
from tokenreduce.ops.similarity import SMALLEST_NORM, unit_vectors

#: Entries that are worked on at a time: 256 Ki float32 values, a MiB, about a frame.
CACHED_ENTRIES = 1 << 18


def same_place_cosine(frames: Tensor, reference: Sequence[int]) -> Tensor:
    """Cosine of each token with the token at the same place of another frame.

    A few tokens at a time, which fit the cache as a clip does not: no copy of the clip is made.

    Args:
        frames: ``(B, T, P, D)``: T frames of P places.
        reference: for each frame, the frame to compare it with.

    Returns:
        ``(B, T, P)`` float32; 0 where one of the two is a zero vector.
    """
    norm = torch.linalg.vector_norm(frames, dim=-1, dtype=torch.float32).clamp(min=SMALLEST_NORM)
    batch, _, places, channels = frames.shape
    # One block for all products: fresh memory costs more than the product.
    product = norm.new_empty(batch, min(places, CACHED_ENTRIES // channels + 1), channels)
    dot = torch.empty_like(norm)
    for t, other in enumerate(reference):
        for begin in range(0, places, product.shape[1]):
            part = slice(begin, begin + product.shape[1])
            one, two = frames[:, t, part].float(), frames[:, other, part].float()
            block = product[:, : one.shape[1]]
            torch.sum(torch.mul(one, two, out=block), dim=2, out=dot[:, t, part])
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


def segment_lengths(means: Tensor, threshold: float, least: int) -> list[int]:
    """How many frames each segment of a clip holds; it is cut where neighbours are unlike.

    Args:
        means: ``(T, D)`` the mean token of each frame.
        threshold: cosine of neighbouring means below which there is a cut.
        least: how many segments there are at least, if there are as many frames; where the
            threshold gives fewer, cuts follow between the neighbours that are least alike.
    """
    unit = unit_vectors(means)
    cosine = (unit[1:] * unit[:-1]).sum(-1)
    cut = cosine < threshold
    more = min(least, len(means)) - 1 - int(cut.sum())
    if more > 0:
        lowest = (-cosine).masked_fill(cut, -torch.inf)
        cut = cut | top_mask(lowest, torch.tensor(more), scale=1.0)
    ends = [*(cut.nonzero().squeeze(1) + 1).tolist(), len(means)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
