"""Pyramids: which tokens a cell holds, by definition; and what a quadtree of them is."""

import pytest
import torch

from tokenreduce.ops.pyramids import cut, pyramid


def cell_of(place, extent, level):
    """The row (column) of a level that a row (column) of tokens lies in."""
    for _ in range(level):
        place, extent = (place + extent % 2) // 2, (extent + 1) // 2
    return place


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5), (1, 9), (2, 6)])
def test_oracle(height, width):
    levels = pyramid(height, width, torch.device("cpu"))
    h, w = height, width
    for number, level in enumerate(levels):
        holds = {}
        for token in range(height * width):
            row = cell_of(token // width, height, number)
            column = cell_of(token % width, width, number)
            holds.setdefault(row * w + column, []).append(token)
        assert level.cell.tolist() == [
            next(cell for cell, tokens in holds.items() if token in tokens)
            for token in range(height * width)
        ]
        assert level.first.tolist() == [min(holds[cell]) for cell in range(h * w)]
        total = torch.zeros(h * w).index_add_(0, level.cell, level.share)
        torch.testing.assert_close(total, torch.ones(h * w))
        h, w = (h + 1) // 2, (w + 1) // 2
    assert len(levels) == 1 or min(h, w) <= 2


def tree_of(values, levels, height, cell, threshold):
    """The cells (level, cell) that one cell is cut into, from the definition."""
    if height == 0:
        return [(0, cell)]
    parts = (levels[height].parent == cell).nonzero()[:, 0].tolist()
    compared = parts + [0] * (4 - len(parts))
    cosines = torch.cosine_similarity(values[height][cell][None], values[height - 1][compared])
    if cosines.min() >= threshold:
        return [(height, cell)]
    return [leaf for part in parts for leaf in tree_of(values, levels, height - 1, part, threshold)]


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.7, 1.0])
def test_quadtree(threshold):
    clip = torch.randn(2, 7 * 6, 4, generator=torch.Generator().manual_seed(3)) + 0.7
    levels = pyramid(7, 6, clip.device)
    cells = cut(clip, levels, threshold)
    expected = []
    for number, frame in enumerate(clip):
        values = [frame]
        for level in levels[1:]:
            means = [values[-1][level.parent == c].mean(0) for c in range(len(level.first))]
            values.append(torch.stack(means))
        leaves = [
            leaf
            for root in range(len(levels[-1].first))
            for leaf in tree_of(values, levels, len(levels) - 1, root, threshold)
        ]
        for height, cell in leaves:
            tokens = (levels[height].cell == cell).nonzero()[:, 0] + number * len(frame)
            expected.append((tokens.tolist(), values[height][cell]))
    expected.sort(key=lambda leaf: leaf[0][0])
    assert cells.first.tolist() == [tokens[0] for tokens, _ in expected]
    for index, (tokens, value) in enumerate(expected):
        assert (cells.cell == index).nonzero()[:, 0].tolist() == tokens
        torch.testing.assert_close(cells.features[index], value)
        torch.testing.assert_close(cells.share[tokens].sum(), torch.tensor(1.0))


@pytest.mark.parametrize("k", [4, 13, 30, 42])
def test_as_many_cells_as_asked(k):
    frame = torch.randn(1, 42, 4, generator=torch.Generator().manual_seed(4))
    cells = cut(frame, pyramid(7, 6, frame.device), 0.7, k)
    assert k <= len(cells.first) < k + 3
