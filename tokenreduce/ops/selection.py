"""Choosing by score, with ties that go to the lowest index."""

import torch
from torch import Tensor

from tokenreduce.errors import ReductionError

#: Scores nearer than this, relative to the largest magnitude of the item, count as equal. A float32
#: matrix product differs in its last bits between batch shapes; without a tolerance an item could
#: be reduced differently alone and in a batch, and duplicate frames would be told apart by noise.
#: It is no larger than that takes: official code has none, and tells apart what differs by more.
TIE_TOLERANCE = 2.5e-7

#: How many runners-up are looked at for ties, and how many times more tokens make that worth it.
SPARE, SPARE_FACTOR = 4, 8


def _tolerance(scores: Tensor, scale: float | Tensor | None) -> Tensor | float:
    if scale is not None:
        return TIE_TOLERANCE * scale
    finite = scores.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return TIE_TOLERANCE * finite.abs_().amax(-1, keepdim=True)


def first_argmax(scores: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
    """Index of the largest score; of those within the tie tolerance, the lowest index.

    Args:
        scores: ``(..., N)`` floating point, N > 0; ``-inf`` marks tokens that are out.
        scale: the magnitude that rounding errors are relative to, a number, ``(..., 1)``, or
            ``(..., N)`` where it differs from score to score. The largest finite score if omitted;
            give 1 for cosines, whose errors do not shrink when all of them are near 0.

    Returns:
        ``(...)`` integers.
    """
    best = scores.amax(-1, keepdim=True)
    near = scores >= best - _tolerance(scores, scale)
    return near.view(torch.uint8).argmax(-1)


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
    if scores.is_cuda:
        kept = top_k_mask(scores, k, scale=scale)
        # nonzero would wait for the device; a stable sort lists the kept indices first, in order.
        return (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :k]
    if SPARE_FACTOR * (k + SPARE) > n:
        return _from_mask(top_k_mask(scores, k, scale=scale), k)
    # Few of many: ties are settled among the best few, unless more tie than those.
    best = scores.topk(k + SPARE, dim=-1)
    threshold = best.values[..., k - 1 : k]
    tolerance = torch.as_tensor(_tolerance(scores, scale)).expand(threshold.shape)
    candidates = best.indices.sort(-1).values
    kept = _kept_mask(scores.gather(-1, candidates), k, threshold, tolerance / TIE_TOLERANCE)
    crowded = best.values[..., -1] >= (threshold - tolerance).squeeze(-1)
    chosen = candidates.gather(-1, _from_mask(kept, k))
    if bool(crowded.any()):
        rows = scores[crowded], k, threshold[crowded], tolerance[crowded] / TIE_TOLERANCE
        chosen[crowded] = _from_mask(_kept_mask(*rows), k)
    return chosen


def top_k_mask(scores: Tensor, k: int, *, scale: float | Tensor | None = None) -> Tensor:
    """The ``k`` largest scores as a mask; at the threshold, the lowest indices win.

    Args:
        scores: ``(..., N)`` float32, without NaN.
        k: how many to take, 0 <= k <= N.
        scale: as for :func:`first_argmax`.

    Returns:
        ``(..., N)`` booleans.
    """
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    return _kept_mask(scores, k, scores.topk(k, dim=-1).values[..., -1:], scale)


def _kept_mask(scores: Tensor, k: int, threshold: Tensor, scale: float | Tensor | None) -> Tensor:
    """The k-th largest score as ``threshold``: what is above, then ties by index."""
    tolerance = _tolerance(scores, scale)
    surely = scores > threshold + tolerance
    tied = (scores >= threshold - tolerance) & ~surely
    open_places = k - surely.sum(-1, keepdim=True, dtype=torch.int32)
    return surely | (tied & (tied.cumsum(-1, dtype=torch.int32) <= open_places))


def _from_mask(kept: Tensor, k: int) -> Tensor:
    index = kept.nonzero()[:, -1]
    if index.numel() != kept[..., 0].numel() * k:
        raise ReductionError(f"the scores of shape {tuple(kept.shape)} hold NaN.")
    return index.reshape(*kept.shape[:-1], k)
