"""Greedy maximum a posteriori inference of determinantal point processes.

Chen, Zhang and Zhou, "Fast Greedy MAP Inference for Determinantal Point Process", 1709.05135.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenreduce.ops.selection import first_argmax

#: The least that a token counts as adding, relative to its own diagonal entry. Less is rounding:
#: the token lies in the span of those picked before.
SPAN_TOLERANCE = 1e-4


def greedy_determinant(diagonal: Tensor, row: Callable[[Tensor], Tensor], k: int) -> Tensor:
    """Pick tokens one by one, each the one that most enlarges the determinant of the picked block.

    Rows of the Cholesky factor are updated as tokens are picked: O(k^2 N) time and O(k N) memory
    beside the rows of the kernel, of which each picked token's is read once. Tokens in the span of
    those picked are ranked by their diagonal entries.

    Args:
        diagonal: ``(B, N)`` diagonal of the kernel, float32 and non-negative.
        row: from ``(B,)`` indices to the ``(B, N)`` rows of the kernel.
        k: how many to pick, 1 <= k <= N.

    Returns:
        ``(B, k)`` indices in the order they were picked; ties go to the lowest index.
    """
    batch, n = diagonal.shape
    items = torch.arange(batch, device=diagonal.device)
    picks = torch.empty((batch, k), dtype=torch.long, device=diagonal.device)
    factor = diagonal.new_empty(batch, k - 1, n)
    scale = diagonal.amax(1, keepdim=True).clamp(min=torch.finfo(diagonal.dtype).tiny)
    gain, least = diagonal.clone(), diagonal * SPAN_TOLERANCE
    for step in range(k):
        newest = first_argmax(gain, scale=scale)
        picks[:, step] = newest
        if step == k - 1:
            break
        update = row(newest)
        if step:
            known = factor[:, :step]
            explained = known[items, :, newest][:, None] @ known
            update = update - explained.squeeze(1)
        # Of a token without any length the row is zero, and so is its quotient.
        root = gain[items, newest, None].clamp(min=torch.finfo(gain.dtype).tiny).sqrt()
        added = torch.div(update, root, out=factor[:, step])
        gain.addcmul_(added, added, value=-1)
        least[items, newest] = -torch.inf
        gain[items, newest] = -torch.inf
        torch.maximum(gain, least, out=gain)
    return picks
