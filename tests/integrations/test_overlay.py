from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.attachment import ItemReduction
from tokenreduce.errors import TokensError
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_integrations.overlay import (
    blocks_and_frames,
    contact_sheet,
    draw_overlay,
    draw_panel,
    heat_color,
    heat_of_budgets,
    heat_of_scores,
    output_color,
    side_by_side,
)
from tokenreduce_integrations.seen import Panel

GRAY = (120, 120, 120)


def item(layout: Layout, groups: list[int] | None, *, merge: bool = False) -> ItemReduction:
    """A reduction in which token i flows into output ``groups[i]``."""
    reduction = None
    if groups is not None:
        tokens = VisualTokens(torch.ones(1, len(layout), 2), layout)
        index = torch.tensor([groups])
        if merge:
            reduction = Reduction.from_groups(tokens, index, int(index.max()) + 1)
        else:
            reduction = Reduction.from_kept(tokens, (index[0] >= 0).nonzero().T)
    return ItemReduction(
        prompt=0,
        modality="image",
        columns=torch.arange(len(layout)),
        layout=layout,
        reduction=reduction,
    )


def cell(drawn: Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    height, width = drawn.height // rows, drawn.width // columns
    pixels = np.asarray(drawn, dtype=int)
    return pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]


def test_small_pictures_are_enlarged_by_a_whole_factor() -> None:
    drawn = draw_overlay(Image.new("RGB", (100, 50), GRAY), item(Layout.from_grid((2, 4)), None))
    assert drawn.size == (800, 400)
    big = draw_overlay(Image.new("RGB", (900, 500), GRAY), item(Layout.from_grid((2, 4)), None))
    assert big.size == (900, 500)


def test_with_everything_kept_the_picture_is_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    drawn = draw_overlay(Image.fromarray(pixels), item(Layout.from_grid((4, 4)), None), side=40)
    assert np.array_equal(np.asarray(drawn), pixels)


def test_kept_tokens_are_bright_and_dropped_ones_dark() -> None:
    drawn = draw_overlay(
        Image.new("RGB", (40, 20), GRAY), item(Layout.from_grid((1, 2)), [0, -1]), side=200
    )
    assert (cell(drawn, 0, 0, 1, 2) == 120).all()
    dark = cell(drawn, 0, 1, 1, 2)
    assert (dark < 40).all()
    assert (dark > 0).all()


def test_merged_tokens_take_the_colour_of_their_output_and_are_linked_to_it() -> None:
    layout = Layout.from_grid((2, 3))
    drawn = draw_overlay(
        Image.new("RGB", (300, 200), GRAY), item(layout, [0, 1, 1, 0, -1, 0], merge=True), side=200
    )
    for output, (row, column) in ((0, (1, 0)), (1, (0, 2)), (0, (1, 2))):
        color = np.array(output_color(output))
        corner = cell(drawn, row, column, 2, 3)[3, 3]
        assert np.argmax(corner) == np.argmax(color)
        assert corner.max() - corner.min() > 20
    # The outputs stand at tokens 0 and 1, framed in their colours, with the picture inside.
    for output, column in ((0, 0), (1, 1)):
        shown = cell(drawn, 0, column, 2, 3)
        assert tuple(shown[0, 50]) == output_color(output)
        assert tuple(shown[15, 15]) == GRAY
    # Half way between the merged token below and its output there is the link.
    assert tuple(np.asarray(drawn)[100, 50]) == output_color(0)
    # A dropped token is linked to nothing.
    assert tuple(cell(drawn, 1, 1, 2, 3)[90, 10]) != GRAY


def test_only_the_asked_block_and_frame_are_drawn() -> None:
    coords = torch.cat(
        [Layout.from_grid((2, 1, 2)).coords, Layout.from_grid((1, 3), block=1).coords]
    )
    layout = Layout(coords)
    kept = item(layout, [0, -1, -1, 1, 2, 3, -1])
    assert blocks_and_frames(kept) == [(0, 0), (0, 1), (1, 0)]
    picture = Image.new("RGB", (60, 60), GRAY)
    first = draw_overlay(picture, kept, side=60)
    second = draw_overlay(picture, kept, frame=1, side=60)
    tile = draw_overlay(picture, kept, block=1, side=60)
    assert [cell(first, 0, x, 1, 2).max() for x in range(2)] == [120, 26]
    assert [cell(second, 0, x, 1, 2).max() for x in range(2)] == [26, 120]
    assert [cell(tile, 0, x, 1, 3).max() for x in range(3)] == [120, 120, 26]
    with pytest.raises(TokensError, match="block 2, frame 0"):
        draw_overlay(picture, kept, block=2)


def test_newlines_are_no_part_of_the_picture() -> None:
    """A protected token beyond the last column must not narrow the others' cells."""
    coords = torch.cat([Layout.from_grid((1, 2)).coords, torch.tensor([[0, 0, 0, 2]])])
    layout = Layout(coords, torch.tensor([False, False, True]))
    drawn = draw_overlay(Image.new("RGB", (60, 60), GRAY), item(layout, [0, -1, 1]), side=60)
    assert (cell(drawn, 0, 0, 1, 2) == 120).all()
    assert (cell(drawn, 0, 1, 1, 2) < 40).all()


def test_grids_that_do_not_divide_the_picture_leave_no_gap() -> None:
    layout = Layout.from_grid((3, 7))
    drawn = draw_overlay(Image.new("RGB", (101, 97), GRAY), item(layout, [0] + [-1] * 20), side=1)
    pixels = np.asarray(drawn, dtype=int)
    assert set(np.unique(pixels)) == {26, 120}
    assert (pixels == 120).sum() == 3 * 14 * 32


def test_colours_of_near_outputs_differ() -> None:
    colors = [np.array(output_color(i)) for i in range(40)]
    for a, b in pairwise(colors):
        assert abs(a - b).sum() > 100


def test_pictures_stand_side_by_side_below_their_labels() -> None:
    red, blue = Image.new("RGB", (100, 80), "red"), Image.new("RGB", (60, 40), "blue")
    sheet = side_by_side([red, blue], ["one", "two"], gap=10)
    assert sheet.size == (100 + 60 + 30, 80 + 30 + 10)
    assert sheet.getpixel((10, 30)) == (255, 0, 0)
    assert sheet.getpixel((120, 30)) == (0, 0, 255)
    labels = np.asarray(sheet)[:30]
    assert (labels[:, 10:110] < 100).any()
    assert (labels[:, 120:180] < 100).any()


def test_regions_that_were_protected_are_a_part_of_the_picture() -> None:
    layout = Layout.from_grid((1, 2)).protect(torch.tensor([True, False]))
    drawn = draw_overlay(Image.new("RGB", (60, 60), GRAY), item(layout, [0, -1]), side=60)
    assert (cell(drawn, 0, 0, 1, 2) == 120).all()
    assert (cell(drawn, 0, 1, 1, 2) < 40).all()


def test_links_cross_the_tiles_of_one_panel() -> None:
    layout = Layout(torch.cat([Layout.from_grid((1, 1), block=block).coords for block in range(2)]))
    boxes = {0: (0, 0, 40, 40), 1: (40, 0, 80, 40)}
    panel = Panel("", (Image.new("RGB", (80, 40), GRAY),), boxes)
    drawn = draw_panel(panel, item(layout, [0, 0], merge=True), side=40)
    assert drawn.getpixel((38, 20)) == output_color(0)


def test_heat_is_the_rank_by_score_with_what_is_kept_framed() -> None:
    tokens = VisualTokens.from_grid(torch.tensor([[[3.0], [9.0], [1.0], [9.0]]]), (1, 4))
    reduction = tr.create_strategy("norm-topk", keep=2)(tokens)
    scored = ItemReduction(
        prompt=0,
        modality="image",
        columns=torch.arange(4),
        layout=tokens.layout,
        reduction=reduction,
    )
    heat = heat_of_scores(scored)
    assert heat == [0.5, 1.0, 0.0, 1.0]
    panel = Panel(
        "", (Image.new("RGB", (80, 20), GRAY),), {i: (20 * i, 0, 20 * i + 20, 20) for i in range(4)}
    )
    drawn = np.asarray(draw_panel(panel, scored, side=20, heat=heat), int)
    for i, value in enumerate(heat):
        expected = 0.35 * 120 + 0.65 * np.array(heat_color(value))
        assert np.abs(drawn[10, 20 * i + 10] - expected).max() <= 1
        assert (drawn[0, 20 * i + 10] == 255).all() == (i in (1, 3))


def test_heat_without_scores_is_how_long_a_token_lasts() -> None:
    layout = Layout.from_grid((1, 3))
    assert heat_of_scores(item(layout, [0, -1, -1])) is None
    assert heat_of_scores(item(layout, None)) is None
    runs = [item(layout, groups) for groups in ([0, 1, -1], [0, -1, -1])]
    assert heat_of_budgets(runs) == [1.0, 0.5, 0.0]


def test_tokens_that_were_not_scored_have_no_heat() -> None:
    tokens = VisualTokens(
        torch.arange(4.0)[None, :, None],
        Layout.from_grid((1, 4)).protect(torch.tensor([True, False, False, False])),
    )
    first = tr.create_strategy("norm-topk", keep=2)(tokens)
    assert first.scores is not None
    assert first.scores.isnan().tolist() == [[True, False, False, False]]
    [left] = first.tokens(tokens)
    both = first.then(tr.create_strategy("norm-topk", keep=1)(left))
    assert both.scores is not None
    # Token 1 was dropped by the first; the second, which saw 2 and 3, has the last word.
    assert both.scores.isnan().tolist() == [[True, True, False, False]]
    assert both.item(0).scores.shape == (1, 4)


def test_contact_sheets_wrap() -> None:
    pictures = [Image.new("RGB", (50, 40), (shade, 0, 0)) for shade in (50, 100, 150)]
    sheet = contact_sheet(pictures, ["", "", ""], columns=2, gap=10)
    assert sheet.size == (50 * 2 + 30, (40 + 30) * 2 + 10)
    assert [sheet.getpixel(at)[0] for at in ((10, 30), (70, 30), (10, 100))] == [50, 100, 150]
    assert sheet.getpixel((70, 100)) == (255, 255, 255)
