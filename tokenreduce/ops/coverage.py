"""Greedy maximum coverage (facility location), evaluated lazily.

Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: How many candidates are evaluated at once.
CHUNK = 32
#: How many candidates are listed at first, and how many times longer the list grows.
LISTED, LONGER = 64, 8
#: Rows that are summed at once before the first pick.
ROWS = 256

Numbers = NDArray[np.float32]


def greedy_coverage(
    cover: Tensor, k: int, *, weight: Tensor, bonus: Tensor | None = None
) -> Tensor:
    """Pick tokens one by one, each the one that adds most to what is covered.

    Token j covers place i to the degree c_ij; a set covers it to the largest degree of its members,
    and at least 0. The score of j beside S is w_j sum_i max(0, c_ij - max_{s in S} c_is) + b_j.
    What a token adds never grows, so its last known score bounds its score: only tokens whose bound
    reaches the best score are evaluated again. The picks are those of the plain greedy algorithm.

    Time O(N R) before the first pick, then O(R) for each evaluation, of which there are a few for
    each pick; memory O(N + R).

    Args:
        cover: ``(B, N, R)`` float32, how much each token covers each of R places.
        k: how many to pick, 1 <= k <= N.
        weight: ``(B, N)`` float32, non-negative factor of each token's gain, of order 1.
        bonus: ``(B, N)`` float32, added to each token's score; nothing if omitted.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    bonus = torch.zeros_like(weight) if bonus is None else bonus
    score = torch.cat([part.clamp(min=0).sum(2) for part in cover.split(ROWS, dim=1)], dim=1)
    score = score.mul_(weight).add_(bonus)
    if cover.device.type != "cpu":
        return _pick_together(cover, score, k, weight, bonus)
    # Beside so short vectors, calls of torch take longer than those of numpy.
    items = zip(cover.numpy(), score.numpy(), weight.numpy(), bonus.numpy(), strict=True)
    return torch.tensor([_pick(*item, k) for item in items])


def _pick(cover: Numbers, score: Numbers, weight: Numbers, bonus: Numbers, k: int) -> list[int]:
    """The picks of one item."""
    covered = np.zeros_like(cover[0])
    picks: list[int] = []
    while True:
        best = int(score.argmax())
        # Rounding errors of a gain are those of its sum, which its weight scales.
        tie = TIE_TOLERANCE * max(score[best], min(weight[best], 1.0))
        newest = int((score >= score[best] - np.float32(tie)).argmax())
        picks.append(newest)
        if len(picks) == k:
            return picks
        score[newest] = -np.inf
        np.maximum(covered, cover[newest], out=covered)
        _refresh(score, cover, covered, weight, bonus)


def _refresh(
    score: Numbers, cover: Numbers, covered: Numbers, weight: Numbers, bonus: Numbers
) -> None:
    """Evaluate tokens by falling bound, in place, until no other can have the best score."""
    bound, n = score.copy(), len(score)
    gained = np.empty((min(CHUNK, n), cover.shape[1]), dtype=np.float32)
    leader, listed = -np.inf, 0
    while listed < n:
        # The few of largest bound mostly settle it; if not, the list begins anew.
        listed = min(max(LISTED, LONGER * listed), n)
        order = bound.argpartition(n - listed)[n - listed :]
        order = order[bound[order].argsort()[::-1]]
        for begin in range(0, listed, CHUNK):
            least = leader - 4 * TIE_TOLERANCE * max(leader, 1.0)
            if bound[order[begin]] < least or bound[order[begin]] == -np.inf:
                return
            ask = order[begin : begin + CHUNK]
            gain = np.take(cover, ask, axis=0, out=gained[: len(ask)], mode="clip")
            gain -= covered
            fresh = np.maximum(gain, 0, out=gain).sum(1) * weight[ask] + bonus[ask]
            fresh[bound[ask] == -np.inf] = -np.inf
            score[ask] = fresh
            leader = max(leader, fresh.max())


def _pick_together(cover: Tensor, score: Tensor, k: int, weight: Tensor, bonus: Tensor) -> Tensor:
    """The items step by step together, so that the device is asked once for all."""
    items = torch.arange(len(cover), device=cover.device)
    picks = torch.empty((len(cover), k), dtype=torch.long, device=cover.device)
    covered = torch.zeros((), device=cover.device)
    for step in range(k):
        best, at = score.max(1, keepdim=True)
        newest = first_argmax(score, scale=torch.maximum(best, weight.gather(1, at).clamp(max=1)))
        picks[:, step] = newest
        if step == k - 1:
            break
        score[items, newest] = -torch.inf
        covered = torch.maximum(covered, cover[items, newest][:, None])
        score = _refreshed(score, cover, covered, weight, bonus)
    return picks


def _refreshed(
    bound: Tensor, cover: Tensor, covered: Tensor, weight: Tensor, bonus: Tensor
) -> Tensor:
    """Scores, evaluated by falling bound until no other token can have the best one.

    Args:
        bound: ``(B, N)`` the most that each score can be, ``-inf`` for tokens that are out.
        cover: ``(B, N, R)``.
        covered: ``(B, 1, R)``.
        weight: ``(B, N)``.
        bonus: ``(B, N)``.

    Returns:
        ``(B, N)`` the scores of the tokens evaluated, the bounds of the others.
    """
    n = bound.shape[1]
    score = bound.clone()
    leader = bound.new_full((bound.shape[0],), -torch.inf)
    listed = 0
    while listed < n:
        listed = min(max(LISTED, LONGER * listed), n)
        most, order = bound.topk(listed, dim=1)
        for begin in range(0, listed, CHUNK):
            least = leader - 4 * TIE_TOLERANCE * leader.clamp(min=1)
            if not bool((most[:, begin] >= least).any()):
                return score
            ask = order[:, begin : begin + CHUNK]
            gain = gather_tokens(cover, ask).sub_(covered).clamp_(min=0).sum(2)
            fresh = gain * weight.gather(1, ask) + bonus.gather(1, ask)
            fresh.masked_fill_(most[:, begin : begin + CHUNK].isneginf(), -torch.inf)
            score.scatter_(1, ask, fresh)
            leader = torch.maximum(leader, fresh.amax(1))
    return score
