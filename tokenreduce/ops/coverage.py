"""Greedy maximum coverage (facility location), evaluated lazily.

Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: How many candidates are evaluated at once.
CHUNK = 16
#: How many candidates are listed at first, and how many times longer the list grows.
LISTED, LONGER = 64, 8


def greedy_coverage(
    cover: Callable[[Tensor], Tensor],
    k: int,
    *,
    weight: Tensor,
    bonus: Tensor | None = None,
) -> Tensor:
    """Pick tokens one by one, each the one that adds most to what is covered.

    Token j covers place i to the degree c_ij; a set covers it to the largest degree of its members,
    and at least 0. The score of j beside S is w_j sum_i max(0, c_ij - max_{s in S} c_is) + b_j.
    What a token adds never grows, so its last known score bounds its score: only tokens whose bound
    reaches the best score are evaluated again. The picks are those of the plain greedy algorithm.

    Time O(N R) before the first pick, then O(R) for each evaluation, of which there are a few for
    each pick; memory O(N + R) beside what ``cover`` holds.

    Args:
        cover: from ``(B, C)`` indices of tokens to ``(B, C, R)`` float32, how much each covers each
            of R places.
        k: how many to pick, 1 <= k <= N.
        weight: ``(B, N)`` float32, non-negative factor of each token's gain, of order 1.
        bonus: ``(B, N)`` float32, added to each token's score; nothing if omitted.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    batch, n = weight.shape
    items = torch.arange(batch, device=weight.device)
    picks = torch.empty((batch, k), dtype=torch.long, device=weight.device)

    def evaluate(ask: Tensor) -> Tensor:
        gain = cover(ask).sub_(covered).clamp_(min=0).sum(2) * weight.gather(1, ask)
        return gain if bonus is None else gain + bonus.gather(1, ask)

    covered = torch.zeros((), device=weight.device)
    everyone = torch.arange(n, device=weight.device).expand(batch, n)
    score = torch.cat([evaluate(part) for part in everyone.split(CHUNK, dim=1)], dim=1)
    for step in range(k):
        # Rounding errors of a gain are those of its sum, which its weight scales.
        best, at = score.max(1, keepdim=True)
        newest = first_argmax(score, scale=torch.maximum(best, weight.gather(1, at).clamp(max=1)))
        picks[:, step] = newest
        if step == k - 1:
            break
        score[items, newest] = -torch.inf
        covered = torch.maximum(covered, cover(newest[:, None]))
        score = _refreshed(score, evaluate)
    return picks


def _refreshed(bound: Tensor, evaluate: Callable[[Tensor], Tensor]) -> Tensor:
    """Scores, evaluated by falling bound until no other token can have the best one.

    Args:
        bound: ``(B, N)`` the most that each score can be, ``-inf`` for tokens that are out.
        evaluate: from ``(B, C)`` indices of tokens to their scores.

    Returns:
        ``(B, N)`` the scores of the tokens evaluated, the bounds of the others.
    """
    n = bound.shape[1]
    score = bound.clone()
    leader = bound.new_full((bound.shape[0],), -torch.inf)
    listed = 0
    while listed < n:
        # The few of largest bound mostly settle it; if not, the list begins anew.
        listed = min(max(LISTED, LONGER * listed), n)
        most, order = bound.topk(listed, dim=1)
        for begin in range(0, listed, CHUNK):
            least = leader - 4 * TIE_TOLERANCE * leader.clamp(min=1)
            if not bool((most[:, begin] >= least).any()):
                return score
            ask = order[:, begin : begin + CHUNK]
            fresh = evaluate(ask).masked_fill_(
                most[:, begin : begin + CHUNK].isneginf(), -torch.inf
            )
            score.scatter_(1, ask, fresh)
            leader = torch.maximum(leader, fresh.amax(1))
    return score
