"""Greedy maximum coverage (facility location), evaluated lazily.

Minoux, "Accelerated greedy algorithms for maximizing submodular set functions", 1978.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: How many candidates are evaluated at once.
CHUNK = 16


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

    def evaluate(ask: Tensor, covered: Tensor | float) -> Tensor:
        gain = (cover(ask) - covered).clamp_(min=0).sum(2) * weight.gather(1, ask)
        return gain if bonus is None else gain + bonus.gather(1, ask)

    everyone = torch.arange(n, device=weight.device).expand(batch, n)
    score = torch.cat([evaluate(part, 0.0) for part in everyone.split(8 * CHUNK, dim=1)], dim=1)
    covered = torch.zeros((), device=weight.device)
    for step in range(k):
        newest = first_argmax(score, scale=score.amax(1, keepdim=True).clamp(min=1))
        picks[:, step] = newest
        if step == k - 1:
            break
        score[items, newest] = -torch.inf
        covered = torch.maximum(covered, cover(newest[:, None]))
        # Picked tokens count as known: they are out.
        known = score == -torch.inf
        leader = score.new_full((batch,), -torch.inf)
        while True:
            bound, ask = score.masked_fill(known, -torch.inf).topk(min(CHUNK, n), dim=1)
            slack = 4 * TIE_TOLERANCE * leader.clamp(min=1)
            if not bool((bound[:, 0] >= leader - slack).any()):
                break
            fresh = torch.where(bound == -torch.inf, score.gather(1, ask), evaluate(ask, covered))
            score.scatter_(1, ask, fresh)
            known.scatter_(1, ask, True)
            leader = score.masked_fill(~known, -torch.inf).amax(1)
    return picks
