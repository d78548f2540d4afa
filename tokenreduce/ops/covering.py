"""Representatives that cover a set of tokens within a radius."""

import torch
from torch import Tensor

from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax
from tokenreduce.ops.similarity import similarity_to


def covering_representatives(
    unit: Tensor,
    sizes: Tensor,
    radius: Tensor,
    *,
    first: Tensor,
    least: int,
    most: int,
    gram: Tensor | None = None,
) -> Tensor:
    """Pick the farthest token again and again until every token has a representative near it.

    While some token lies outside ``radius`` of its nearest representative, the farthest token is
    picked, up to ``most``. If all are covered before there are ``least``, the pick is the token of
    largest distance times the size of its representative's group, so that what is left goes to
    contents in proportion to their extent. Sequential over the picks, with running distances.

    Args:
        unit: ``(b, n, D)`` unit vectors.
        sizes: ``(b, n)`` float32, how many source tokens each stands for.
        radius: ``(b,)`` largest cosine distance at which a token is covered.
        first: ``(b,)`` the first pick of each item.
        least: picks that every item makes.
        most: picks that an item may make.
        gram: ``(b, n, n)`` inner products of ``unit``, where the caller has them.

    Returns:
        ``(b, most)`` indices, ascending; ``first`` again where fewer are needed.
    """
    rows = torch.arange(unit.shape[0], device=unit.device)
    picks = first[:, None].repeat(1, most)
    nearest = torch.full_like(sizes, -2)
    owner = torch.zeros_like(sizes, dtype=torch.long)
    taken = torch.zeros_like(sizes, dtype=torch.bool)
    newest = first
    for step in range(1, most):
        cosine = similarity_to(unit, newest, gram)
        owner = owner.masked_fill(cosine > nearest + TIE_TOLERANCE, step - 1)
        nearest = torch.maximum(nearest, cosine)
        taken[rows, newest] = True
        distance = cosine_distance(nearest)
        far = distance.masked_fill(taken, 0).amax(1, keepdim=True)
        uncovered = far > radius[:, None]
        scale = torch.ones_like(far)
        if step < least:
            size = sizes.new_zeros(len(rows), step).scatter_add(1, owner, sizes)
            distance = distance * torch.where(uncovered, 1, size.gather(1, owner))
            scale = torch.where(uncovered, 1, size.amax(1, keepdim=True))
        elif not bool(uncovered.any()):
            break
        distance = distance.masked_fill(taken, -torch.inf)
        newest = first_argmax(distance, scale=scale)
        picks[:, step] = newest if step < least else torch.where(uncovered[:, 0], newest, first)
    return picks.sort(1).values


#: Cosine distances below this are rounding of one and the same vector.
DISTANCE_NOISE = 1e-5


def join_nearest(cosine: Tensor, picks: Tensor, least: Tensor) -> Tensor:
    """The nearest representative of each token, if it is near enough.

    Args:
        cosine: ``(b, n, r)`` similarity of each token to each representative.
        picks: ``(b, r)`` the representatives, ascending; of repeated ones the first counts.
        least: ``(b,)`` the lowest cosine at which a token joins.

    Returns:
        ``(b, n)`` in [0, r), -1 for tokens that are near none.
    """
    group = first_argmax(cosine, scale=1.0)
    nearest = cosine.gather(2, group[..., None]).squeeze(2)
    group = group.masked_fill(nearest < least[:, None], -1)
    own = torch.arange(picks.shape[1], device=picks.device)
    return group.scatter_reduce(1, picks, own.expand_as(picks), "amin", include_self=False)


def distance_to_larger(distance: Tensor, size: Tensor) -> Tensor:
    """How far each group is from the nearest that is no smaller.

    Args:
        distance: ``(b, r, r)`` between groups.
        size: ``(b, r)``; of equal ones, the earlier counts as larger.

    Returns:
        ``(b, r)``; of the largest group its largest distance from any.
    """
    index = torch.arange(size.shape[1], device=size.device)
    larger = size[:, None] > size[..., None]
    larger |= (size[:, None] == size[..., None]) & (index < index[:, None])
    apart = distance.masked_fill(~larger, torch.inf).amin(2)
    return torch.where(larger.any(2), apart, distance.amax(2))


def mean_and_spread(unit: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean direction of tokens, and the mean cosine distance of two of them.

    Args:
        unit: ``(b, n, D)`` unit vectors.
        sizes: ``(b, n)`` float32, the weights of the mean.

    Returns:
        ``(b, D)`` and ``(b,)``.
    """
    share = sizes / sizes.sum(1, keepdim=True)
    mean = (share[:, None] @ unit).squeeze(1)
    return mean, spread_around(mean)


def spread_around(mean: Tensor) -> Tensor:
    """``(b,)`` mean cosine distance of two tokens whose mean direction is ``(b, D)``."""
    return (1 - mean.square().sum(-1)).clamp(min=DISTANCE_NOISE)


def cosine_distance(cosine: Tensor) -> Tensor:
    """Cosine distance, exactly 0 for repetitions of a vector."""
    return (1 - DISTANCE_NOISE - cosine).clamp(min=0)
