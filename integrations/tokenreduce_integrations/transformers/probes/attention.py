"""Signals of one attention layer, from the queries and keys that it attends with.

All of them are per patch: ``(B, S)`` for attention, ``(B, S, C)`` for queries and keys, the class
token included where the tower has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Entries of a block of attention rows that are held at once: 256 MiB in float32.
_BLOCK = 2**26


def class_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention of the first token to each, averaged over heads."""
    row: Tensor = (query[:, :, :1].float() @ key.float().transpose(2, 3)) * scale
    return row.softmax(-1).mean(1)[:, 0]


def received_attention(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention that each token receives, averaged over heads and over those that attend."""
    batch, heads, length, _ = query.shape
    rows = max(1, _BLOCK // (batch * key.shape[2]))
    total = torch.zeros(batch, key.shape[2], device=key.device)
    for head in range(heads):
        transposed = key[:, head].float().transpose(1, 2)
        for block in query[:, head].split(rows, dim=1):
            total += ((block.float() @ transposed) * scale).softmax(-1).sum(1)
    return total / (heads * length)


def joined_heads(states: Tensor) -> Tensor:
    """``(B, S, H * D)`` of queries or keys ``(B, H, S, D)``."""
    return states.transpose(1, 2).flatten(2)


SIGNALS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "class_attention": class_attention,
    "shallow_class_attention": class_attention,
    "received_attention": received_attention,
    "queries": lambda query, key, scale: joined_heads(query),
    "keys": lambda query, key, scale: joined_heads(key),
}


def segments(
    query: Tensor, key: Tensor, kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys that attend to each other: all, or those between a kernel's bounds."""
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is None:
        yield query, key
        return
    lengths = bounds.diff().tolist()
    yield from zip(query.split(lengths, dim=2), key.split(lengths, dim=2), strict=True)
