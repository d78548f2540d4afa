"""Greedy selection by a score that similar tokens lower for each other."""

import torch
from torch import Tensor

from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import similarity_to


def marginal_relevance(
    unit: Tensor, score: Tensor, k: int, *, balance: float, gram: Tensor | None = None
) -> Tensor:
    """Maximal marginal relevance: picks by score, less similarity to the nearest pick before.

    Sequential over the ``k`` picks with a running largest similarity: O(k N) time given the Gram
    matrix, O(k N D) without it, and O(N) extra memory either way.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        score: ``(B, N)`` float32, about 0 to 1.
        k: how many to pick, 1 <= k <= N.
        balance: weight of the score, in [0, 1]; similarity weighs the rest.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    items = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    relevance = balance * score
    newest = first_argmax(relevance, scale=1.0)
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
    items = torch.arange(unit.shape[0], device=unit.device)
    picks = torch.empty((unit.shape[0], k), dtype=torch.long, device=unit.device)
    # Tokens put aside rank behind all others: scores span 2.
    ranked, aside = score.clone(), score - 4
    for step in range(k):
        newest = first_argmax(ranked, scale=1.0)
        picks[:, step] = newest
        if step == k - 1:
            break
        cosine = similarity_to(unit, newest, gram)
        ranked = torch.where(cosine > threshold, torch.minimum(ranked, aside), ranked)
        ranked[items, newest] = -torch.inf
    return picks
