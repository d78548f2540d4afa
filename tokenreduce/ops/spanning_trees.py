"""Single linkage: maximum spanning trees of similarity graphs, and what is left when links go."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops.limits import require_matrix
from tokenreduce.ops.similarity import gram_matrix

#: Similarities are rounded to multiples of this, so that noise does not tell duplicates apart.
RESOLUTION = 2.0**-20
#: Entries of the Gram matrices held at a time: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24


class SpanningTree(NamedTuple):
    """A maximum spanning tree of each item.

    Attributes:
        parent: ``(B, n)`` the token that each token hangs on; token 0 hangs on itself.
        similarity: ``(B, n)`` cosine of the two; -inf for token 0.
    """

    parent: Tensor
    similarity: Tensor


def maximum_spanning_tree(unit: Tensor) -> SpanningTree:
    """Prim's algorithm on the complete graph of cosines.

    The components of the graph of all pairs more similar than a threshold are those of the tree's
    links above it; and taking the links from the strongest on is single-linkage clustering.
    Sequential over the n tokens, each step O(n).

    Args:
        unit: ``(B, n, D)`` unit vectors.

    Returns:
        the trees; ties go to the lowest index. Memory beside the tokens: bounded, n x n for a
        single item.

    Raises:
        TokensError: if n is too large for a matrix of that size.
    """
    require_matrix(unit.shape[1], "spanning trees")
    together = max(1, TILE_ENTRIES // unit.shape[1] ** 2)
    parents, similarities = zip(*(_grow(part) for part in unit.split(together)), strict=True)
    return SpanningTree(torch.cat(parents), torch.cat(similarities))


def _grow(unit: Tensor) -> tuple[Tensor, Tensor]:
    gram = gram_matrix(unit)
    gram.div_(RESOLUTION).round_().mul_(RESOLUTION)
    rows = torch.arange(unit.shape[0], device=unit.device)
    newest = torch.zeros_like(rows)
    parent = newest[:, None].expand(unit.shape[:2])
    similarity = torch.full(unit.shape[:2], -torch.inf, device=unit.device)
    best = similarity.clone()
    in_tree = torch.zeros_like(best)
    for _ in range(1, unit.shape[1]):
        # Tokens of the tree are out of reach.
        in_tree.scatter_(1, newest[:, None], -torch.inf)
        best.scatter_(1, newest[:, None], -torch.inf)
        reached = gram[rows, newest] + in_tree
        parent = torch.where(reached > best, newest[:, None], parent)
        best = torch.maximum(best, reached)
        strongest, newest = best.max(1)
        similarity.scatter_(1, newest[:, None], strongest[:, None])
    return parent, similarity


def components(parent: Tensor, linked: Tensor) -> Tensor:
    """The components that are left of a forest when some links are cut.

    Args:
        parent: ``(B, n)`` the token that each token hangs on; roots hang on themselves.
        linked: ``(B, n)`` booleans, the links to parents that stay.

    Returns:
        ``(B, n)`` the lowest index in each token's component.
    """
    index = torch.arange(parent.shape[1], device=parent.device).expand_as(parent)
    top = torch.where(linked, parent, index)
    for _ in range(max(1, parent.shape[1] - 1).bit_length()):
        top = top.gather(1, top)
    first = torch.full_like(top, parent.shape[1]).scatter_reduce(1, top, index, "amin")
    return first.gather(1, top)


def edge_components(count: int, one: Tensor, other: Tensor, *, complete: bool = True) -> Tensor:
    """The components of a sparse graph.

    Labels begin as the nodes' own indices; in each round, a node takes the lowest label among its
    own and its neighbours', and then the label of that.

    Args:
        count: number of nodes, n.
        one: ``(E,)`` one end of each edge.
        other: ``(E,)`` the other end.
        complete: go on until both ends of every edge have the same label. Otherwise stop as soon
            as every label is its own, which can leave parts of a component apart.

    Returns:
        ``(n,)`` the lowest index in each node's component.
    """
    label = torch.arange(count, device=one.device)
    while True:
        low = label.scatter_reduce(0, one, label[other], "amin")
        low = low.scatter_reduce(0, other, label[one], "amin")
        label = low[low]
        settled = label[label].equal(label)
        if settled and (not complete or label[one].equal(label[other])):
            return label


def strongest_components(
    count: int, one: Tensor, other: Tensor, strength: Tensor, k: int
) -> Tensor:
    """Single linkage on a sparse graph: the strongest edges that leave ``k`` components.

    Args:
        count: number of nodes, n.
        one: ``(E,)`` one end of each edge.
        other: ``(E,)`` the other end.
        strength: ``(E,)`` similarity of the two; ties go to the first edge.
        k: how many components to leave, 1 <= k <= n; all edges are taken where that leaves more.

    Returns:
        ``(n,)`` the lowest index in each node's component.
    """
    order = (strength / RESOLUTION).round().argsort(descending=True, stable=True)
    one, other = one[order], other[order]
    # Each edge joins two components at most, so their number falls by at most one.
    enough, label = len(order), edge_components(count, one, other)
    few = 0
    while few < enough:
        middle = (few + enough) // 2
        attempt = edge_components(count, one[:middle], other[:middle])
        if len(attempt.unique()) <= k:
            enough, label = middle, attempt
        else:
            few = middle + 1
    return label
