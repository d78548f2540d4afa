"""Pyramids: which tokens a cell holds, by definition."""

import pytest
import torch

from tokenreduce.ops.pyramids import pyramid


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
