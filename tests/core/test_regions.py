"""Regions of pictures, and the tokens that show them."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenreduce as tr
from tokenreduce.errors import TokensError
from tokenreduce.regions import Regions, as_region

hundredths = st.integers(0, 100).map(lambda n: n / 100)
sides = st.tuples(hundredths, hundredths).filter(lambda pair: pair[0] != pair[1]).map(sorted)


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    wide=sides,
    high=sides,
)
def test_a_token_is_inside_if_its_cell_shares_an_area(
    grid: tuple[int, int, int], wide: list[float], high: list[float]
) -> None:
    layout = tr.Layout.from_grid(grid)
    inside = layout.within([(wide[0], high[0], wide[1], high[1])])
    _, rows, columns = grid
    x0, x1 = (Fraction(round(side * 100), 100) for side in wide)
    y0, y1 = (Fraction(round(side * 100), 100) for side in high)
    for (_, _, y, x), found in zip(layout.coords.tolist(), inside.tolist(), strict=True):
        overlaps = (
            max(Fraction(x, columns), x0) < min(Fraction(x + 1, columns), x1)
            and max(Fraction(y, rows), y0) < min(Fraction(y + 1, rows), y1)
        )  # fmt: skip
        assert found == overlaps


def test_edges_that_only_touch_do_not_count() -> None:
    # 0.29 * 100 is a little less than 29 in floating point.
    layout = tr.Layout.from_grid((1, 100))
    assert layout.within([(0.29, 0, 0.58, 1)]).nonzero().squeeze(1).tolist() == list(range(29, 58))
    assert not layout.within([]).any()
    both = layout.within([(0, 0, 0.01, 1), (0.99, 0, 1, 1)])
    assert both.nonzero().squeeze(1).tolist() == [0, 99]


def test_each_block_has_its_own_extent() -> None:
    parts = [tr.Layout.from_grid((2, 2)), tr.Layout.from_grid((4, 3), block=1)]
    coords = torch.cat([part.coords for part in parts])
    layout = tr.Layout(coords, extents={0: (2, 2), 1: (4, 3)})
    inside = layout.within([(0, 0.5, 0.5, 1)])
    assert inside.tolist() == [False, False, True, False, *[False] * 6, *[True, True, False] * 2]
    assert layout.select(torch.tensor([2, 3])).within([(0, 0.5, 0.5, 1)]).tolist() == [True, False]
    guarded = layout.protect(inside)
    assert torch.equal(guarded.within([(0, 0.5, 0.5, 1)]), inside)


def test_tokens_without_a_place_are_refused() -> None:
    for layout in (
        tr.Layout.line(6),
        tr.Layout(tr.Layout.from_grid((2, 3)).coords),
        tr.Layout(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]]), extents={1: (1, 1)}),
    ):
        with pytest.raises(TokensError, match="not known which part"):
            layout.within([(0, 0, 1, 1)])
        assert not layout.within([]).any()


def test_regions_for_all_or_for_each() -> None:
    box = (0, 0, 0.5, 1)
    assert not Regions()
    assert not Regions([])
    assert not Regions([[], []])
    assert Regions([box]).of(3) == ((as_region(box),),) * 3
    assert Regions([list(box)]).of(1) == ((as_region(box),),)
    assert Regions([[], [box]]).of(2) == ((), (as_region(box),))
    with pytest.raises(TokensError, match="2 visual items, this call has 3"):
        Regions([[], [box]]).of(3)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 1),
        (0, 0, 1, True),
        (0, 0, 1, "1"),
        (0.5, 0, 0.4, 1),
        (0, 0, 0, 1),
        (0, 0, 1.01, 1),
        (0, 0, float("inf"), 1),
        None,
    ],
)
def test_malformed_boxes_are_refused(box: object) -> None:
    with pytest.raises(TokensError):
        as_region(box)
