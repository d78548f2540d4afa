"""Gathering tokens of a batch, each item at its own indices."""

from torch import Tensor


def gather_tokens(tensor: Tensor, index: Tensor) -> Tensor:
    """Take tokens at per-item indices.

    Args:
        tensor: ``(B, N, ...)``.
        index: ``(B, M)`` integers in [0, N).

    Returns:
        ``(B, M, ...)``.
    """
    if tensor.ndim == 2:
        return tensor.gather(1, index)
    trailing = tensor.shape[2:]
    expanded = index.reshape(*index.shape, *(1 for _ in trailing)).expand(*index.shape, *trailing)
    return tensor.gather(1, expanded)
