"""Uniform: centres of cells on grids, even strides elsewhere."""

import pytest
import torch

from tokenreduce import Layout, VisualTokens
from tokenreduce_strategies.uniform import Uniform


def kept(grid, keep):
    layout = grid if isinstance(grid, Layout) else Layout.from_grid(grid)
    tokens = VisualTokens(torch.randn(2, len(layout), 4), layout)
    positions = Uniform(keep=keep)(tokens).positions
    assert positions[0].equal(positions[1])
    return positions[0].tolist()


def test_centres_of_cells():
    assert kept((4, 4), 4) == [5, 7, 13, 15]
    assert kept((6, 6), 4) == [7, 10, 25, 28]


@pytest.mark.parametrize("keep", [24, 36, 64, 100])
def test_no_row_or_column_of_cells_is_missed(keep):
    places = kept((24, 24), keep)
    quarters = {(place // 24 // 6, place % 24 // 6) for place in places}
    assert len(quarters) == 16


def test_frames_get_equal_shares():
    places = kept((4, 6, 6), 16)
    assert [sum(place // 36 == t for place in places) for t in range(4)] == [4] * 4


def test_rest_of_the_budget_is_strided_over_the_rest():
    cells, more = kept((6, 6), 4), kept((6, 6), 5)
    rest = [n for n in range(36) if n not in cells]
    assert sorted([*cells, rest[16]]) == more


def test_without_a_grid_the_order_is_strided():
    coords = torch.cat([Layout.from_grid((2, 4), block=b).coords for b in range(3)])
    assert kept(Layout(coords), 6) == [2, 6, 10, 14, 18, 22]
