"""Gathering tokens of a batch, each item at its own indices."""

import torch
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
    if tensor.shape[0] == 1:
        return tensor[0].index_select(0, index[0])[None]
    # Row by row; gather() would look up every entry.
    return tensor[torch.arange(tensor.shape[0], device=tensor.device)[:, None], index]
