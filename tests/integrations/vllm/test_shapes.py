"""Shapes that travel from vLLM's processor to its workers say where tokens lie."""

import torch

from tokenreduce.tokens import Layout
from tokenreduce_integrations.vllm.shapes import Block, Shape


def test_a_plain_picture_is_a_full_grid() -> None:
    layout = Shape.grid(1, 3, 4).layout
    assert layout == Layout.from_grid((3, 4))
    assert layout.extents == {0: (3, 4)}


def test_a_class_token_comes_first_and_is_protected() -> None:
    shape = Shape(blocks=(Block(rows=2, columns=2),), class_token=True)
    assert len(shape) == 5
    assert shape.layout.protected.tolist() == [True, False, False, False, False]
    assert shape.layout.select(shape.layout.free) == Layout.from_grid((2, 2))


def test_newlines_end_rows_of_a_mosaic_and_are_protected() -> None:
    shape = Shape(
        blocks=(Block(rows=2, columns=2), Block(rows=3, columns=2, newlines="rows")),
    )
    layout = shape.layout
    assert len(shape) == len(layout) == 4 + 3 * 3
    assert layout.protected.nonzero().squeeze(1).tolist() == [6, 9, 12]
    assert layout.coords[6].tolist() == [1, 0, 0, 2]
    assert layout.extents == {0: (2, 2), 1: (3, 2)}


def test_one_newline_ends_a_clip() -> None:
    layout = Shape(blocks=(Block(frames=2, rows=2, columns=2, newlines="end"),)).layout
    assert len(layout) == 9
    assert layout.protected.nonzero().squeeze(1).tolist() == [8]
    assert layout.coords[8].tolist() == [0, 1, 1, 2]


def test_tiles_are_blocks_and_of_them_the_last_shows_the_whole_picture() -> None:
    tile = Block(rows=2, columns=2, whole=False)
    layout = Shape(blocks=(tile, tile, Block(rows=2, columns=2))).layout
    assert layout.coords[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert layout.extents == {2: (2, 2)}


def test_tokens_without_geometry_lie_in_a_line() -> None:
    layout = Shape.line(5).layout
    assert torch.equal(layout.coords, Layout.line(5).coords)
    assert not layout.extents


def test_shapes_survive_being_written() -> None:
    shape = Shape(
        blocks=(Block(rows=2, columns=2), Block(rows=3, columns=2, newlines="rows", whole=False)),
        class_token=True,
    )
    assert Shape.from_list(shape.to_list()) == shape
