"""Greedy selection in rounds, where being like a pick can only lower what a token is worth."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax

#: Among how many of the tokens of largest worth the next picks are looked for.
CANDIDATES = 256
#: Closest similarity of a token before anything is picked: less than any cosine.
NOTHING_NEAR = -2.0


def pick_in_rounds(
    unit: Tensor,
    score: Tensor,
    k: int,
    *,
    first: Tensor,
    worth: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Pick tokens one by one, each the one of largest worth beside those picked before.

    A pick lowers the worth of tokens and raises none, so the next ones are looked for among the
    tokens of largest worth, as long as the best of those beats the bound of all others. Then the
    similarities of all tokens to the picks of the round are computed, by one matrix product. The
    picks are those of the plain greedy algorithm. O(k N D) time, O(N) extra memory.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        score: ``(B, N)`` float32, of order 1, what ``worth`` is told of each token.
        k: how many to pick, 1 <= k <= N.
        first: ``(B,)`` the first pick of each item.
        worth: from scores and the cosines of tokens to the picks nearest to them, both ``(B, n)``,
            to their worth; entry by entry, never more where the cosine is larger, and ``-inf``
            where the score is.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    item = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    closest = torch.full_like(score, NOTHING_NEAR)
    newest, done, known = first, 0, 0
    while True:
        value = worth(score, closest)
        best = value.topk(min(CANDIDATES + 1, value.shape[1]), dim=1)
        bound = best.values[:, -1] if best.values.shape[1] > CANDIDATES else -torch.inf
        near = best.indices[:, :CANDIDATES].sort(dim=1).values
        near_unit = gather_tokens(unit, near)
        near_score, near_closest = score.gather(1, near), closest.gather(1, near)
        while True:
            picks[:, done] = newest
            done += 1
            if done == k:
                return picks
            cosine = torch.bmm(near_unit, unit[item, newest, :, None]).squeeze(2)
            torch.maximum(near_closest, cosine, out=near_closest)
            near_score.masked_fill_(near == newest[:, None], -torch.inf)
            value = worth(near_score, near_closest)
            place = first_argmax(value, scale=1.0)
            newest = near[item, place]
            if bool((value[item, place] < bound + 2 * TIE_TOLERANCE).any()):
                break
        latest = picks[:, known:done]
        cosine = (unit @ gather_tokens(unit, latest).mT).amax(2)
        closest = torch.maximum(closest, cosine)
        score = score.scatter(1, latest, -torch.inf)
        known = done
        # All similarities are up to date: the next pick is the best of all tokens.
        newest = first_argmax(worth(score, closest), scale=1.0)
