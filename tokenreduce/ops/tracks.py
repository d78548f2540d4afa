"""Places of a clip followed through time, for clips of any length."""

import torch
from torch import Tensor

from tokenreduce.ops.links import follow_links
from tokenreduce.ops.similarity import directions
from tokenreduce.tokens import Layout

#: Tokens that are copied at once: half a MiB at 1024 channels in float32, which caches hold.
PART_TOKENS = 128
#: How many times as many elsewhere than on the CPU, where each copy waits to be started.
ELSEWHERE = 16


def tracks(layout: Layout) -> tuple[Tensor, Tensor]:
    """Tokens ordered by place, then frame; and which follow their own place in the frame before.

    Returns:
        order ``(N,)``, and booleans ``(N,)`` in that order.
    """
    block, t, y, x = (column.unique(return_inverse=True)[1] for column in layout.coords.unbind(1))
    place = (block * len(layout) + y) * len(layout) + x
    order = t.argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    linked = torch.zeros(len(layout), dtype=torch.bool)
    linked[1:] = (place[order].diff() == 0) & (t[order].diff() == 1)
    return order, linked


def track_cosine(features: Tensor, order: Tensor, linked: Tensor) -> Tensor:
    """Cosine of each token with its own place in the frame before.

    Args:
        features: ``(N, D)``.
        order: as :func:`tracks` gives it, on the features' device.
        linked: the same.

    Returns:
        ``(N,)`` float32; ``-inf`` for tokens that follow none.
    """
    cosine = torch.full(order.shape, -torch.inf, device=features.device)
    follows = linked.nonzero()[:, 0]
    cosine[order[follows]] = between(features, order[follows], order[follows - 1])
    return cosine


def tubes(order: Tensor, repeats: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of tokens that each repeat their own place in the frame before.

    Args:
        order: as :func:`tracks` gives it.
        repeats: ``(N,)`` which tokens do.

    Returns:
        heads ``(n,)``, the first token of each run, ascending; and ``(N,)`` the run of each token.
    """
    begins = ~repeats[order]
    tube = torch.empty_like(order)
    tube[order] = begins.cumsum(0) - 1
    heads, rank = order[begins].sort()
    return heads, rank.argsort()[tube]


def rejoin(heads: Tensor, tube: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Runs as :func:`tubes` gives them, each joined to that of the token it belongs to.

    Args:
        heads: ``(n,)``.
        tube: ``(N,)``.
        first: ``(N,)`` the first token that each belongs together with.
    """
    runs = torch.arange(len(heads), device=heads.device)
    end = follow_links(runs.scatter_reduce(0, tube, tube[first], "amin"))
    own = end == runs
    return heads[own], (own.cumsum(0) - 1)[end][tube]


def first_of_equals(numbers: Tensor) -> Tensor:
    """``(N,)`` index of the first token whose number is the same, for numbers ``(N,)``."""
    value = numbers.unique(return_inverse=True)[1]
    row = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(row, len(row)).scatter_reduce(0, value, row, "amin")
    return first[value]


def mean_direction(features: Tensor, sizes: Tensor) -> Tensor:
    """``(1, D)`` mean of the directions of tokens ``(N, D)``, weighted by sizes ``(1, N)``."""
    share = sizes / sizes.sum(1, keepdim=True)
    mean = torch.zeros(1, features.shape[1], device=features.device)
    count = _part(features)
    for part, weight in zip(features.split(count), share.split(count, 1), strict=True):
        mean += weight @ directions(part)
    return mean


def cosine_to(features: Tensor, rows: Tensor, direction: Tensor) -> Tensor:
    """Inner product ``(n,)`` of the directions of the tokens at ``rows`` with one ``(D,)``."""
    cosine = torch.empty(rows.shape, device=features.device)
    count = _part(features)
    for part, out in zip(rows.split(count), cosine.split(count), strict=True):
        out.copy_(directions(features[part]) @ direction)
    return cosine


def between(features: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Cosine ``(n,)`` of the tokens at ``one`` and those at ``other``, both ``(n,)``."""
    cosine = torch.empty(one.shape, device=features.device)
    parts = (tensor.split(_part(features)) for tensor in (one, other, cosine))
    for a, b, out in zip(*parts, strict=True):
        out.copy_((directions(features[a]) * directions(features[b])).sum(-1))
    return cosine


def _part(features: Tensor) -> int:
    """Tokens that are copied at once."""
    return PART_TOKENS * (1 if features.device.type == "cpu" else ELSEWHERE)
