"""Farthest-first traversal: the greedy 2-approximation of max-min diversity."""

import torch
from torch import Tensor

from tokenreduce.ops.rounds import pick_in_rounds
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import similarity_to


def farthest_first(unit: Tensor, k: int, *, first: Tensor, gram: Tensor | None = None) -> Tensor:
    """Pick tokens one by one, each the farthest (cosine) from those picked before.

    Sequential over the ``k`` picks with a running nearest distance: O(k N) time given the Gram
    matrix. Without it, O(k N D), in rounds (see :mod:`tokenreduce.ops.rounds`). The picks are the
    same. O(N) extra memory.

    Args:
        unit: ``(B, N, D)`` unit vectors.
        k: how many to pick, 1 <= k <= N.
        first: ``(B,)`` the first pick of each item.
        gram: ``(B, N, N)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    if gram is None:
        alike = unit.new_zeros(unit.shape[:2])
        return pick_in_rounds(unit, alike, k, first=first, worth=torch.sub)
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
