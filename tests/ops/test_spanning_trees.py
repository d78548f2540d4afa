"""Spanning trees against threshold graphs and single linkage by definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import spanning_trees as module
from tokenreduce.ops import unit_vectors
from tokenreduce.ops.spanning_trees import (
    RESOLUTION,
    components,
    edge_components,
    maximum_spanning_tree,
    strongest_components,
)


def slow_components(similar):
    """Lowest index of each node's component, by flooding."""
    n = len(similar)
    label = list(range(n))
    for start in range(n):
        if label[start] != start:
            continue
        stack = [start]
        while stack:
            i = stack.pop()
            for j in range(n):
                if similar[i][j] and label[j] > start:
                    label[j] = start
                    stack.append(j)
    return label


@quick
@given(clouds(dtypes=(torch.float32,)), st.floats(-1, 1))
def test_threshold_graphs(cloud, threshold):
    unit = unit_vectors(cloud)
    cosine = ((unit @ unit.transpose(1, 2)) / RESOLUTION).round() * RESOLUTION
    tree = maximum_spanning_tree(unit)
    labels = components(tree.parent, tree.similarity > threshold)
    assert labels.tolist() == [slow_components((item > threshold).tolist()) for item in cosine]


@quick
@given(clouds(dtypes=(torch.float32,), min_tokens=2), st.data())
def test_single_linkage(cloud, data):
    """Joining the most similar groups, one by one, gives as similar groups."""
    n = cloud.shape[1]
    links = data.draw(st.integers(0, n - 1))
    unit = unit_vectors(cloud)
    tree = maximum_spanning_tree(unit)
    strongest = tree.similarity.argsort(dim=1, descending=True, stable=True)[:, :links]
    linked = torch.zeros_like(tree.parent, dtype=torch.bool).scatter_(1, strongest, True)
    labels = components(tree.parent, linked)
    for b, item in enumerate(unit):
        groups = [{i} for i in range(n)]
        level = 9.0
        for _ in range(links):
            pairs = [
                (max(float(item[i] @ item[j]) for i in one for j in other), a, c)
                for a, one in enumerate(groups)
                for c, other in enumerate(groups)
                if a < c
            ]
            level, a, c = max(pairs)
            groups[a] |= groups.pop(c)
        assert len(labels[b].unique()) == len(groups)
        if links:
            assert abs(float(tree.similarity[b, strongest[b, -1]]) - level) < 1e-5


def test_tiles_and_batches_agree(monkeypatch):
    unit = unit_vectors(torch.randn(5, 20, 8, generator=torch.Generator().manual_seed(0)))
    whole = maximum_spanning_tree(unit)
    monkeypatch.setattr(module, "TILE_ENTRIES", 800)
    for one, other in zip(whole, maximum_spanning_tree(unit), strict=True):
        assert one.equal(other)


@st.composite
def graphs(draw):
    count = draw(st.integers(1, 9))
    node = st.integers(0, count - 1)
    edges = draw(st.lists(st.tuples(node, node, st.integers(0, 4)), min_size=1, max_size=14))
    one, other, strength = torch.tensor(edges).unbind(1)
    return count, one, other, strength.float() / 4


def adjacency(count, pairs):
    linked = [[i == j for j in range(count)] for i in range(count)]
    for i, j in pairs:
        linked[i][j] = linked[j][i] = True
    return linked


@quick
@given(graphs())
def test_edge_components(graph):
    count, one, other, _ = graph
    pairs = list(zip(one.tolist(), other.tolist(), strict=True))
    wanted = slow_components(adjacency(count, pairs))
    assert edge_components(count, one, other).tolist() == wanted
    # Stopping early only leaves parts apart.
    early = edge_components(count, one, other, complete=False).tolist()
    assert all(wanted[i] == wanted[label] for i, label in enumerate(early))


@quick
@given(graphs(), st.data())
def test_strongest_components(graph, data):
    count, one, other, strength = graph
    k = data.draw(st.integers(1, count))
    edges = sorted(
        zip(one.tolist(), other.tolist(), strength.tolist(), strict=True), key=lambda e: -e[2]
    )
    taken = []
    for i, j, _ in edges:
        if len(set(slow_components(adjacency(count, taken)))) <= k:
            break
        taken.append((i, j))
    labels = strongest_components(count, one, other, strength, k)
    assert labels.tolist() == slow_components(adjacency(count, taken))
