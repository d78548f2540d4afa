"""Greedy maximum a posteriori inference of determinantal point processes.

Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal Point Process", 1709.05135.
"""

import math

import numpy as np
import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: The least that a token counts as adding, relative to its own diagonal entry. Less is rounding:
#: the token lies in the span of those picked before.
SPAN_TOLERANCE = 1e-4

#: How many rows of the kernel are computed at once on the CPU.
ROWS = 16


def greedy_determinant(left: Tensor, right: Tensor, k: int, *, ridge: float = 0.0) -> Tensor:
    """Pick tokens one by one, each the one that most enlarges the determinant of the picked block.

    The kernel is L_ij = left_i . right_j, plus ``ridge`` on the diagonal; it is never held. Each
    pick adds a row to its Cholesky factor: the pick's row of the kernel, less what earlier picks
    explain of it. O(k N D + k^2 N) time and O(k N) memory. Tokens in the span of those picked are
    ranked by their diagonal entries, and explain nothing.

    Args:
        left: ``(B, N, D)`` float32, detached.
        right: ``(B, N, D)`` float32, detached; left @ right.mT is symmetric and positive
            semidefinite.
        k: how many to pick, 1 <= k <= N.
        ridge: added to the diagonal, not negative.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    gain = torch.linalg.vecdot(left, right) + ridge
    if left.device.type != "cpu":
        return _pick_together(left, right, gain, k, ridge)
    items = zip(left, right, gain, strict=True)
    return torch.stack([_pick_ahead(*item, k, ridge) for item in items])


def _pick_together(left: Tensor, right: Tensor, gain: Tensor, k: int, ridge: float) -> Tensor:
    """The items step by step together, so that nothing waits for the device."""
    item = torch.arange(left.shape[0], device=left.device)
    tiny = torch.finfo(left.dtype).tiny
    least = gain * SPAN_TOLERANCE
    own = gain.clamp(min=tiny)
    factor = left.new_empty(left.shape[0], k, left.shape[1])
    picks = torch.empty((left.shape[0], k), dtype=torch.long, device=left.device)
    for step in range(k):
        # Rounding errors of what a token adds are those of its diagonal entry.
        newest = first_argmax(gain, scale=own.gather(1, gain.argmax(1, keepdim=True)))
        picks[:, step] = newest
        pivot = gain[item, newest]
        spanned = pivot <= least[item, newest]
        root = pivot.clamp(min=tiny).sqrt()
        row = torch.bmm(right, gather_tokens(left, newest[:, None]).mT).squeeze(2)
        known = factor[:, :step]
        row -= torch.bmm(known[item, :, newest][:, None], known).squeeze(1)
        row.div_(root[:, None])
        if not ridge:
            # In the span of the others: what is left of the row is rounding.
            row.masked_fill_(spanned[:, None], 0)
        factor[:, step] = row
        least[item, newest] = -torch.inf
        gain = torch.maximum(gain.addcmul(row, row, value=-1), least)
        gain[item, newest] = -torch.inf
    return picks


def _pick_ahead(left: Tensor, right: Tensor, gain: Tensor, k: int, ridge: float) -> Tensor:
    """The picks ``(k,)`` of one item, with rows of the kernel computed before they are asked for.

    A row takes a pass over the tokens, and so do several. Tokens that add much are mostly picked
    soon, so their rows come along; the picks do not depend on it.
    """
    tiny = torch.finfo(left.dtype).tiny
    # Beside so short vectors, calls of torch take longer than those of numpy.
    worth, least = gain.numpy(), (gain * SPAN_TOLERANCE).numpy()
    # Rounding errors of what a token adds are those of its diagonal entry.
    tie = worth.clip(min=tiny) * np.float32(TIE_TOLERANCE)
    factor = left.new_empty(k, len(left))
    # By token: its row of the kernel, less what the picks before some step explain; that step.
    ahead: dict[int, tuple[Tensor, int]] = {}
    missing = torch.zeros_like(gain)
    picks: list[int] = []
    for step in range(k):
        best = worth.argmax()
        newest = int((worth >= worth[best] - tie[best]).argmax())
        picks.append(newest)
        own = factor[step]
        if not ridge and worth[newest] <= least[newest]:
            # In the span of the others: what is left of its row is rounding.
            own.zero_()
            ahead.pop(newest, None)
            worth[newest] = least[newest] = -np.inf
            continue
        if newest not in ahead:
            if len(ahead) > k:
                ahead.clear()
                missing.zero_()
            likely = gain + missing
            likely[newest] = torch.inf
            likely = likely.topk(min(ROWS, k - step)).indices
            rows = right @ left[likely].T
            rows.addmm_(factor[:step].T, factor[:step, likely], alpha=-1)
            missing[likely] = -torch.inf
            ahead |= {
                token: (row, step) for token, row in zip(likely.tolist(), rows.T, strict=True)
            }
        row, since = ahead.pop(newest)
        known = factor[since:step]
        torch.addmv(row, known.T, known[:, newest], alpha=-1, out=own)
        added = own.numpy()
        added /= math.sqrt(worth[newest])
        least[newest] = -np.inf
        np.subtract(worth, added * added, out=worth)
        np.maximum(worth, least, out=worth)
        worth[newest] = -np.inf
    return torch.tensor(picks)
