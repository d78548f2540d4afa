"""Importance by random walks over an attention graph (AIM, 2412.03248)."""

from torch import Tensor


def attention_page_rank(
    logits: Tensor, *, tau: float = 0.1, iterations: int = 5, damping: float = 0.0
) -> Tensor:
    """How often a walk that follows attention comes by each token.

    Each head's logits, over ``tau`` and by softmax, are the steps of a walk. From equal shares p,
    ``iterations`` times p <- (1 - damping) p M + damping / N; the heads are put together by the
    root of the mean square.

    Args:
        logits: ``(B, H, N, N)`` attention logits, already masked; every row has a finite entry.
        tau: temperature, positive.
        iterations: how many steps, at least 0.
        damping: share of walks that start anew at each step, in [0, 1].

    Returns:
        ``(B, N)`` float32. Memory: one copy of the logits.
    """
    walk = (logits.float() / tau).softmax(dim=-1)
    share = walk.new_full((*walk.shape[:2], 1, walk.shape[-1]), 1 / walk.shape[-1])
    for _ in range(iterations):
        share = (1 - damping) * (share @ walk) + damping / walk.shape[-1]
    return share.squeeze(2).square().mean(1).sqrt()
