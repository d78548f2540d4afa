"""Budgets that differ from row to row: sharing a total, and taking so many of each row."""

import torch
from torch import Tensor

from tokenreduce.errors import ReductionError
from tokenreduce.ops.selection import TIE_TOLERANCE

#: Shares nearer than this to a whole token, or to each other, count as equal. Weights are float32
#: and multiplied by the budget, so their errors are larger than those of a score.
SHARE_TOLERANCE = 1e-4

#: Weights below this part of the mean count as that much, so that rows without weight can take
#: what full ones leave.
SMALLEST_WEIGHT = 1e-6


def top_mask(scores: Tensor, counts: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
    """The largest scores of each row, a different number of each; ties go to the lowest index.

    Args:
        scores: ``(..., N)`` floating point.
        counts: ``(...)`` integers in [0, N], how many to take of each row.
        scale: the magnitude that rounding errors are relative to, see
            :func:`tokenreduce.ops.first_argmax`.

    Returns:
        ``(..., N)`` booleans, ``counts`` of them true in each row.
    """
    counts = counts[..., None].to(scores.device)
    if scale is None:
        scale = scores.masked_fill(~scores.isfinite(), 0).abs().amax(-1, keepdim=True)
    tolerance = TIE_TOLERANCE * scale
    ranked = scores.sort(dim=-1, descending=True).values
    threshold = ranked.gather(-1, (counts - 1).clamp(min=0)).masked_fill(counts == 0, torch.inf)
    surely = scores > threshold + tolerance
    tied = (scores >= threshold - tolerance) & ~surely
    return surely | (tied & (tied.cumsum(-1) <= counts - surely.sum(-1, keepdim=True)))


def apportion(weights: Tensor, total: int, cap: int, *, least: int = 0) -> Tensor:
    """Share a total among rows in proportion to their weights, in whole numbers.

    Every row is given ``least`` first, or as much as all can have alike; the rest goes out in
    proportion. What a full row cannot take goes to the others. Fractions are settled by largest
    remainder, ties in favour of the first row.

    Args:
        weights: ``(..., T)`` floating point, not negative.
        total: what to share, 0 <= total <= T * cap.
        cap: the most that one row takes.
        least: what each row takes, where the total is large enough.

    Returns:
        ``(..., T)`` integers in [0, cap] that sum to ``total``.
    """
    rows = weights.shape[-1]
    least = min(least, cap, total // rows)
    room, rest = cap - least, total - rows * least
    weight = weights.double()
    mean = weight.mean(-1, keepdim=True)
    weight = torch.where(mean > 0, weight / mean, 1).clamp(min=SMALLEST_WEIGHT)
    # With the m heaviest rows full, the others share what is left; the first m that fits holds.
    ranked = weight.sort(dim=-1, descending=True).values
    left_weight = ranked.flip(-1).cumsum(-1).flip(-1)
    level = (rest - room * torch.arange(rows, device=weight.device)) / left_weight
    fits = level * ranked <= room + SHARE_TOLERANCE
    level = level.gather(-1, fits.to(torch.uint8).argmax(-1, keepdim=True))
    share = (level * weight).clamp(max=room)
    whole = (share + SHARE_TOLERANCE).floor().clamp(max=room)
    remainder = (share - whole).masked_fill(whole == room, -torch.inf)
    left = (rest - whole.sum(-1)).round().long()
    extra = top_mask(remainder, left, scale=SHARE_TOLERANCE / TIE_TOLERANCE)
    return whole.long() + extra + least


def kept_indices(mask: Tensor) -> Tensor:
    """The indices of the kept tokens of each item, ascending.

    Args:
        mask: ``(B, N)`` booleans with equally many true ones in each row.

    Returns:
        ``(B, k)`` integers.

    Raises:
        ReductionError: if the rows differ in number.
    """
    counts = mask.sum(1)
    if bool((counts != counts[0]).any()):
        raise ReductionError(
            f"the items of a batch keep different numbers of tokens ({counts.tolist()}). Give them "
            "one by one, or packed (reduce_packed does so for adaptive strategies)."
        )
    return mask.nonzero()[:, 1].reshape(mask.shape[0], -1)
