"""Merging tokens: a sparse linear map from source tokens to outputs."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: Entries of a tensor of half precision that are widened at once: 4 Mi float32 values, 16 MiB.
CHUNK_ENTRIES = 1 << 22
#: Channels that are widened together at least; fewer would read each cache line several times.
LEAST_WIDTH = 32


class MergeWeights(NamedTuple):
    """A batch of sparse matrices as edges: output ``o`` receives ``value`` times source ``s``.

    Attributes:
        output: ``(B, E)`` index of the output.
        source: ``(B, E)`` index of the source token.
        value: ``(B, E)`` float32; edges of value 0 are padding.
    """

    output: Tensor
    source: Tensor
    value: Tensor


def group_weights(groups: Tensor, weights: Tensor, count: int) -> MergeWeights:
    """The weighted mean of each group.

    Args:
        groups: ``(B, N)`` group of each source token, -1 for tokens that are dropped.
        weights: ``(B, N)`` non-negative weight of each source token (its size, say).
        count: number of groups, M.

    Returns:
        edges whose values sum to one over each group that has any weight.
    """
    belongs = groups >= 0
    output = groups.clamp(min=0)
    weight = weights.float() * belongs
    total = weight.new_zeros(groups.shape[0], count).scatter_add(1, output, weight)
    source = torch.arange(groups.shape[1], device=groups.device).expand_as(groups)
    value = weight / total.gather(1, output).clamp(min=torch.finfo(torch.float32).tiny)
    return MergeWeights(output, source, value)


def merge_tokens(
    tensor: Tensor, weights: MergeWeights, count: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Apply a merge to any per-token tensor, accumulating in float32 (float64 stays float64).

    Args:
        tensor: ``(B, N, ...)`` floating point.
        weights: the edges.
        count: number of outputs, M.
        dtype: type of the result; the tensor's if omitted.

    Returns:
        ``(B, M, ...)``.
    """
    batch, n = tensor.shape[:2]
    # The weights are float32, so the product is at least that wide.
    wide = torch.promote_types(tensor.dtype, weights.value.dtype)
    item = torch.arange(batch, device=tensor.device)[:, None]
    row, order = (weights.output + item * count).flatten().sort(stable=True)
    source = (weights.source + item * n).flatten()[order]
    value = weights.value.flatten()[order].to(wide)
    ends = torch.bincount(row, minlength=batch * count).cumsum(0)
    # Each output is one bag of rows, added up in the order of its edges, on any device.
    bags = torch.nn.functional.pad(ends, (1, 0))
    table = tensor.reshape(batch * n, math.prod(tensor.shape[2:]))
    width = max(LEAST_WIDTH, CHUNK_ENTRIES // max(1, len(table)))
    merged = [
        torch.nn.functional.embedding_bag(
            source,
            part.to(wide),
            bags,
            mode="sum",
            per_sample_weights=value,
            include_last_offset=True,
        ).to(dtype or tensor.dtype)
        for part in ([table] if table.dtype == wide else table.split(width, dim=1))
    ]
    whole = torch.cat(merged, dim=1) if len(merged) > 1 else merged[0]
    return whole.reshape(batch, count, *tensor.shape[2:])


def compose(outer: MergeWeights, inner: MergeWeights, middle: int) -> MergeWeights:
    """The product of two merges: first ``inner``, then ``outer``.

    Args:
        outer: edges from the middle tokens to the outputs.
        inner: edges from the source tokens to the middle tokens.
        middle: number of middle tokens.

    Returns:
        edges from the source tokens to the outputs; several may join the same two.
    """
    batch = torch.arange(outer.output.shape[0], device=outer.output.device)[:, None]
    first, second = inner.value != 0, outer.value != 0
    # A join on the middle token: inner edges sorted by it, outer edges each take their run.
    arrives = (inner.output + batch * middle)[first]
    order = arrives.argsort(stable=True)
    leaves = (outer.source + batch * middle)[second]
    runs = torch.bincount(arrives, minlength=batch.shape[0] * middle)
    begin, repeats = (runs.cumsum(0) - runs)[leaves], runs[leaves]
    edge = torch.repeat_interleave(torch.arange(leaves.numel(), device=leaves.device), repeats)
    within = torch.arange(edge.numel(), device=edge.device) - (repeats.cumsum(0) - repeats)[edge]
    step = order[begin[edge] + within]
    return _pad_edges(
        batch.expand_as(outer.output)[second][edge],
        outer.output[second][edge],
        inner.source[first][step],
        outer.value[second][edge] * inner.value[first][step],
        items=batch.shape[0],
    )


def _pad_edges(
    item: Tensor, output: Tensor, source: Tensor, value: Tensor, *, items: int
) -> MergeWeights:
    """Edges listed item after item, as rows of equal length; ``item`` is ascending."""
    edges = torch.bincount(item, minlength=items)
    longest = int(edges.max()) if item.numel() else 0
    slot = torch.arange(item.numel(), device=item.device) - (edges.cumsum(0) - edges)[item]

    def rows(values: Tensor) -> Tensor:
        padded = values.new_zeros(items, longest)
        padded[item, slot] = values
        return padded

    return MergeWeights(rows(output), rows(source), rows(value))
