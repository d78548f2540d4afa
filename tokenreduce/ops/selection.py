"""Choosing by score, with ties that go to the lowest index."""

import torch
from torch import Tensor

from tokenreduce.errors import ReductionError

#: Scores nearer than this, relative to the largest magnitude of the item, count as equal. A float32
#: matrix product differs in its last bits between batch shapes; without a tolerance an item could
#: be reduced differently alone and in a batch, and duplicate frames would be told apart by noise.
TIE_TOLERANCE = 1e-6


def _tolerance(scores: Tensor, scale: float | Tensor | None) -> Tensor | float:
    if scale is not None:
        return TIE_TOLERANCE * scale
    finite = scores.masked_fill(~scores.isfinite(), 0)
    return TIE_TOLERANCE * finite.abs().amax(-1, keepdim=True)


def first_argmax(scores: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
    """Index of the largest score; of those within the tie tolerance, the lowest index.

    Args:
        scores: ``(..., N)`` floating point, N > 0; ``-inf`` marks tokens that are out.
        scale: the magnitude that rounding errors are relative to, a number or ``(..., 1)``. The
            largest finite score if omitted; give 1 for cosines, whose errors do not shrink when
            all of them are near 0.

    Returns:
        ``(...)`` integers.
    """
    best = scores.amax(-1, keepdim=True)
    near = scores >= best - _tolerance(scores, scale)
    return near.to(torch.uint8).argmax(-1)


def top_k_indices(scores: Tensor, k: int, *, scale: float | Tensor | None = None) -> Tensor:
    """Indices of the ``k`` largest scores, ascending; at the threshold, the lowest indices win.

    Args:
        scores: ``(..., N)`` floating point.
        k: how many to take, 0 <= k <= N.
        scale: as for :func:`first_argmax`.

    Returns:
        ``(..., k)`` integers, ascending.

    Raises:
        ReductionError: if the scores hold NaN (on a CUDA device the result is undefined then,
            since looking would wait for the device).
    """
    scores = scores.float()
    n = scores.shape[-1]
    if k == 0 or k == n:
        return torch.arange(k, device=scores.device).expand(*scores.shape[:-1], k)
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    tolerance = _tolerance(scores, scale)
    surely = scores > threshold + tolerance
    tied = (scores >= threshold - tolerance) & ~surely
    open_places = k - surely.sum(-1, keepdim=True)
    kept = surely | (tied & (tied.cumsum(-1) <= open_places))
    if kept.is_cuda:
        # nonzero would wait for the device; a stable sort lists the kept indices first, in order.
        return (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
    index = kept.nonzero()[:, -1]
    if index.numel() != kept[..., 0].numel() * k:
        raise ReductionError(f"the scores of shape {tuple(scores.shape)} hold NaN.")
    return index.reshape(*scores.shape[:-1], k)
