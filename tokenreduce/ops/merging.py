"""Merging tokens: a sparse linear map from source tokens to outputs."""

from typing import NamedTuple

import torch
from torch import Tensor

#: Entries of the tensor that are weighted at once: 512 Ki float32 values, 2 MiB.
CHUNK_ENTRIES = 1 << 19


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
    batch = torch.arange(tensor.shape[0], device=tensor.device)[:, None]
    # The weights are float32, so the product is at least that wide.
    wide = torch.promote_types(tensor.dtype, weights.value.dtype)
    merged: Tensor = tensor.new_zeros(tensor.shape[0] * count, *tensor.shape[2:], dtype=wide)
    step = max(1, CHUNK_ENTRIES // max(1, batch.numel() * tensor[:1, :1].numel()))
    for start in range(0, weights.value.shape[1], step):
        output, source, value = (edge[:, start : start + step] for edge in weights)
        value = value.reshape(*value.shape, *(1 for _ in tensor.shape[2:]))
        contributions = (tensor[batch, source] * value).flatten(0, 1)
        row = (output + batch * count).flatten()
        # index_add_ is fast but atomic, hence unordered, on CUDA; index_put_ sorts there first.
        if merged.is_cuda:
            merged.index_put_((row,), contributions, accumulate=True)
        else:
            merged.index_add_(0, row, contributions)
    return merged.reshape(tensor.shape[0], count, *tensor.shape[2:]).to(dtype or tensor.dtype)


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
