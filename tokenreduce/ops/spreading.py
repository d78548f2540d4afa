"""Farthest-first traversal: the greedy 2-approximation of max-min diversity."""

import torch
from torch import Tensor

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax
from tokenreduce.ops.similarity import similarity_to

#: Among how many of the farthest tokens the next picks are looked for, without a Gram matrix.
CANDIDATES = 256


def farthest_first(unit: Tensor, k: int, *, first: Tensor, gram: Tensor | None = None) -> Tensor:
    """Pick tokens one by one, each the farthest (cosine) from those picked before.

    Sequential over the ``k`` picks with a running nearest distance: O(k N) time given the Gram
    matrix. Without it, O(k N D) in products of many picks at once: a pick takes tokens nearer and
    none farther, so the next ones are looked for among the farthest tokens, as long as the best of
    those beats the bound of all others. The picks are the same. O(N) extra memory.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        k: how many to pick, 1 <= k <= N.
        first: ``(B,)`` the first pick of each item.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    if gram is None:
        return _in_rounds(unit, k, first)
    rows = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    picks[:, 0] = first
    # Minus the similarity to the nearest pick, which ranks tokens as their distance does.
    apart = torch.full(unit.shape[:2], torch.inf, device=unit.device)
    newest = first
    for step in range(1, k):
        torch.minimum(apart, similarity_to(unit, newest, gram).neg_(), out=apart)
        apart[rows, newest] = -torch.inf
        # Errors of a cosine are absolute: among near-duplicates every distance is noise.
        newest = first_argmax(apart, scale=1.0)
        picks[:, step] = newest
    return picks


def _in_rounds(unit: Tensor, k: int, first: Tensor) -> Tensor:
    item = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    apart = torch.full(unit.shape[:2], torch.inf, device=unit.device)
    newest, done, known = first, 0, 0
    while True:
        best = apart.topk(min(CANDIDATES + 1, apart.shape[1]), dim=1)
        bound = best.values[:, -1] if best.values.shape[1] > CANDIDATES else -torch.inf
        near = best.indices[:, :CANDIDATES].sort(dim=1).values
        near_unit, near_apart = gather_tokens(unit, near), apart.gather(1, near)
        while True:
            picks[:, done] = newest
            done += 1
            if done == k:
                return picks
            cosine = torch.bmm(near_unit, unit[item, newest, :, None]).squeeze(2)
            torch.minimum(near_apart, cosine.neg_(), out=near_apart)
            near_apart.masked_fill_(near == newest[:, None], -torch.inf)
            place = first_argmax(near_apart, scale=1.0)
            newest = near[item, place]
            if bool((near_apart[item, place] < bound + 2 * TIE_TOLERANCE).any()):
                break
        latest = picks[:, known:done]
        cosine = (unit @ gather_tokens(unit, latest).mT).amax(2)
        apart = torch.minimum(apart, cosine.neg_()).scatter_(1, latest, -torch.inf)
        known = done
        # All distances are up to date: the next pick is the best of all tokens.
        newest = first_argmax(apart, scale=1.0)
