"""Greedy selection by a score that similar tokens lower for each other."""

import torch
from torch import Tensor

from tokenreduce.ops.rounds import pick_in_rounds
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import similarity_to

#: What tokens put aside lose, so that they rank behind all others: scores span 2.
ASIDE = 4.0


def marginal_relevance(
    unit: Tensor, score: Tensor, k: int, *, balance: float, gram: Tensor | None = None
) -> Tensor:
    """Maximal marginal relevance: picks by score, less similarity to the nearest pick before.

    Sequential over the ``k`` picks with a running largest similarity: O(k N) time given the Gram
    matrix. Without it, O(k N D), in rounds (see :mod:`tokenreduce.ops.rounds`). The picks are the
    same. O(N) extra memory.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        score: ``(B, N)`` float32, about 0 to 1.
        k: how many to pick, 1 <= k <= N.
        balance: weight of the score, in [0, 1]; similarity weighs the rest.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    relevance = balance * score
    newest = first_argmax(relevance, scale=1.0)
    if gram is None:

        def worth(own: Tensor, closest: Tensor) -> Tensor:
            return own.sub(closest, alpha=1 - balance)

        return pick_in_rounds(unit, relevance, k, first=newest, worth=worth)
    items = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    closest = torch.full_like(relevance, -1.0)
    for step in range(k):
        picks[:, step] = newest
        if step == k - 1:
            break
        relevance[items, newest] = -torch.inf
        cosine = similarity_to(unit, newest, gram)
        closest = torch.maximum(closest, cosine)
        newest = first_argmax(relevance - (1 - balance) * closest, scale=1.0)
    return picks


def exclusive_picks(
    unit: Tensor, score: Tensor, k: int, *, threshold: float, gram: Tensor | None = None
) -> Tensor:
    """Picks by score; each puts aside the tokens that are more similar to it than a threshold.

    Once no other tokens are left, those put aside follow, by score. Cost as for
    :func:`marginal_relevance`.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        score: ``(B, N)`` float32 in [-1, 1].
        k: how many to pick, 1 <= k <= N.
        threshold: largest cosine of two tokens that may both be picked at first.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    if gram is None:

        def worth(own: Tensor, closest: Tensor) -> Tensor:
            return torch.where(closest > threshold, own - ASIDE, own)

        first = first_argmax(score, scale=1.0)
        return pick_in_rounds(unit, score, k, first=first, worth=worth)
    items = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    ranked, aside = score.clone(), score - ASIDE
    for step in range(k):
        newest = first_argmax(ranked, scale=1.0)
        picks[:, step] = newest
        if step == k - 1:
            break
        cosine = similarity_to(unit, newest, gram)
        ranked = torch.where(cosine > threshold, torch.minimum(ranked, aside), ranked)
        ranked[items, newest] = -torch.inf
    return picks
