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


def apportion(weights: Tensor, total: int, cap: int | Tensor, *, least: int = 0) -> Tensor:
    """Share a total among rows in proportion to their weights, in whole numbers.

    Every row is given ``least`` first, if the total allows that for all; the rest goes out in
    proportion. What a full row cannot take goes to the others. Fractions are settled by largest
    remainder, ties in favour of the first row.

    Args:
        weights: ``(..., T)`` floating point, not negative.
        total: what to share, from 0 to the sum of the caps.
        cap: the most that a row takes, one number or ``(..., T)`` integers.
        least: what each row takes, or its cap if that is less.

    Returns:
        ``(..., T)`` integers within the caps that sum to ``total``.
    """
    most = torch.as_tensor(cap, device=weights.device).expand(weights.shape)
    start = most.clamp(max=least)
    start = torch.where(start.sum(-1, keepdim=True) <= total, start, 0)
    room, rest = (most - start).double(), total - start.sum(-1, keepdim=True)
    weight = weights.double()
    mean = weight.mean(-1, keepdim=True)
    weight = torch.where(mean > 0, weight / mean, 1).clamp(min=SMALLEST_WEIGHT)
    # With the m rows full that have the most weight for their room, the others share what is left;
    # the first m that fits holds.
    order = (weight / room).argsort(dim=-1, descending=True, stable=True)
    ranked, space = weight.gather(-1, order), room.gather(-1, order)
    filled = space.cumsum(-1) - space
    level = (rest - filled) / ranked.flip(-1).cumsum(-1).flip(-1)
    fits = level * ranked <= space + SHARE_TOLERANCE
    level = level.gather(-1, fits.to(torch.uint8).argmax(-1, keepdim=True))
    share = torch.minimum(level * weight, room)
    whole = torch.minimum((share + SHARE_TOLERANCE).floor(), room)
    remainder = (share - whole).masked_fill(whole == room, -torch.inf)
    left = (rest.squeeze(-1) - whole.sum(-1)).round().long()
    extra = top_mask(remainder, left, scale=SHARE_TOLERANCE / TIE_TOLERANCE)
    return start + whole.long() + extra


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
