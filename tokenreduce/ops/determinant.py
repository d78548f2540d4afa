"""Greedy maximum a posteriori inference of determinantal point processes.

Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal Point Process", 1709.05135.
"""

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: The least that a token counts as adding, relative to its own diagonal entry. Less is rounding:
#: the token lies in the span of those picked before.
SPAN_TOLERANCE = 1e-4

#: Among how many tokens of largest gain the next picks are looked for, and how many picks are made
#: there at most before the gains of all tokens are brought up to date.
CANDIDATES, ROUND = 128, 64


def greedy_determinant(left: Tensor, right: Tensor, k: int, *, ridge: float = 0.0) -> Tensor:
    """Pick tokens one by one, each the one that most enlarges the determinant of the picked block.

    The kernel is L_ij = left_i . right_j, plus ``ridge`` on the diagonal; it is never held. A pick
    lowers what other tokens add and raises none, so the next ones are looked for among the tokens
    that added most, as long as the best of those beats all others' bound. Then the rows of the
    Cholesky factor are computed for all tokens at once, by matrix products. The picks are those of
    the plain greedy algorithm. O(k N D + k^2 N) time and O(k N) memory. Tokens in the span of those
    picked are ranked by their diagonal entries.

    Args:
        left: ``(B, N, D)`` float32.
        right: ``(B, N, D)`` float32; left @ right.mT is symmetric and positive semidefinite.
        k: how many to pick, 1 <= k <= N.
        ridge: added to the diagonal, not negative.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    batch, n, _ = left.shape
    item = torch.arange(batch, device=left.device)
    tiny = torch.finfo(left.dtype).tiny
    # Less the ridge, which all tokens share: beside it, small differences would look like rounding.
    gain = (left * right).sum(2)
    least = gain * SPAN_TOLERANCE
    scale = gain.amax(1, keepdim=True).clamp(min=tiny)
    factor = left.new_empty(batch, k, n)
    picks = torch.empty((batch, k), dtype=torch.long, device=left.device)
    done = 0
    while done < k:
        best = gain.topk(min(CANDIDATES + 1, n), dim=1)
        bound = best.values[:, -1] if n > CANDIDATES else gain.new_full((batch,), -torch.inf)
        certain = bound + 2 * TIE_TOLERANCE * scale[:, 0]
        near = best.indices[:, :CANDIDATES].sort(dim=1).values
        near_right, near_gain = gather_tokens(right, near), gain.gather(1, near)
        rows = torch.arange(done, device=left.device)[:, None]
        near_factor = left.new_empty(batch, done + ROUND, near.shape[1])
        near_factor[:, :done] = factor[item[:, None, None], rows, near[:, None]]
        # All gains are up to date, so that the first pick is the best of all tokens.
        newest = first_argmax(gain, scale=scale)
        own, pivot = factor[item, :done, newest], gain[item, newest]
        taken = near == newest[:, None]
        near_gain.masked_fill_(taken, -torch.inf)
        near_least = least.gather(1, near).masked_fill_(taken, -torch.inf)
        last = min(done + ROUND, k)
        roots = []
        for step in range(done, last):
            picks[:, step] = newest
            roots.append((pivot + ridge).clamp(min=tiny).sqrt())
            if step == last - 1:
                break
            row = torch.bmm(near_right, left[item, newest, :, None]).squeeze(2)
            row -= torch.bmm(own[:, None], near_factor[:, :step]).squeeze(1)
            near_factor[:, step] = row.div_(roots[-1][:, None])
            near_gain = torch.maximum(near_gain.addcmul_(row, row, value=-1), near_least)
            place = first_argmax(near_gain, scale=scale)
            newest, pivot = near[item, place], near_gain[item, place]
            if bool((pivot < certain).any()):
                last = step + 1
                break
            own = near_factor[item, : step + 1, place]
            near_gain[item, place] = -torch.inf
            near_least[item, place] = -torch.inf
        if last == k:
            break
        _complete(factor, left, right, picks[:, :last], torch.stack(roots, dim=1))
        added = factor[:, done:last]
        gain = gain - added.square().sum(1)
        least.scatter_(1, picks[:, done:last], -torch.inf)
        gain = torch.maximum(gain, least).scatter(1, picks[:, done:last], -torch.inf)
        done = last
    return picks


def _complete(factor: Tensor, left: Tensor, right: Tensor, picks: Tensor, roots: Tensor) -> None:
    """Write the last rows of the Cholesky factor, those of ``roots``.

    Args:
        factor: ``(B, k, N)``, of which the rows of earlier picks are known.
        picks: ``(B, t)`` all picks so far.
        roots: ``(B, p)`` diagonal entries of the rows to write, those of the last p picks.
    """
    start = picks.shape[1] - roots.shape[1]
    newest = picks[:, start:]
    rows = gather_tokens(left, newest) @ right.mT
    if start:
        known = factor[:, :start]
        rows -= known.gather(2, newest[:, None].expand(-1, start, -1)).mT @ known
    # Rows of the newest picks at each other: the Cholesky factor of this block, lower triangle.
    block = rows.gather(2, newest[:, None].expand(-1, newest.shape[1], -1)).tril(-1)
    for step in range(roots.shape[1]):
        block[:, :, step] -= (block[:, :, :step] @ block[:, step, :step, None]).squeeze(2)
        block[:, step + 1 :, step] /= roots[:, step, None]
        block[:, : step + 1, step] = 0
        block[:, step, step] = roots[:, step]
    factor[:, start : picks.shape[1]] = torch.linalg.solve_triangular(block, rows, upper=False)
