"""Pictures of what a reduction kept, merged and dropped."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.attachment import ItemReduction
from tokenreduce.errors import TokensError

Color = tuple[int, int, int]

_DROPPED_LIGHT = 0.22
_MERGED_LIGHT = 0.6
_TINT = 0.18
_GOLDEN_ANGLE = 0.618034


class _Cell(NamedTuple):
    """One token of the picture; ``output`` is -1 for a dropped one."""

    box: tuple[int, int, int, int]
    output: int
    kept: bool

    @property
    def centre(self) -> tuple[int, int]:
        left, top, right, bottom = self.box
        return (left + right) // 2, (top + bottom) // 2


def draw_overlay(
    image: Image.Image, item: ItemReduction, *, block: int = 0, frame: int = 0, side: int = 384
) -> Image.Image:
    """Draw what became of each token over the picture that it came from.

    Kept tokens are as bright as the picture. Tokens that were merged are tinted in the colour of
    the output that they flowed into and linked to it; that output is framed in the same colour.
    Dropped tokens are dark. Protected tokens that are no part of the picture, such as newlines,
    are not drawn.

    Args:
        image: the picture, or one frame of the clip, as the model saw it.
        item: what became of its tokens.
        block: the tile or crop to draw.
        frame: the frame to draw.
        side: small pictures are enlarged by a whole factor until their shorter side reaches this.

    Raises:
        TokensError: if the item has no tokens in that block and frame.
    """
    factor = max(1, math.ceil(side / min(image.size)))
    size = (image.width * factor, image.height * factor)
    picture = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    cells = _cells(item, picture.size, block, frame)
    groups: dict[int, int] = {}
    for cell in cells.values():
        groups[cell.output] = groups.get(cell.output, 0) + 1

    pixels = np.asarray(picture, dtype=np.float32).copy()
    for cell in cells.values():
        if not cell.kept:
            left, top, right, bottom = cell.box
            _darken(pixels[top:bottom, left:right], cell.output)
    shaded = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(shaded)
    homes = {cell.output: cell.centre for cell in cells.values() if cell.kept}
    thickness = max(1, round(min(shaded.size) / 320))
    for cell in cells.values():
        if not cell.kept and cell.output in homes:
            color = output_color(cell.output)
            draw.line((*cell.centre, *homes[cell.output]), fill=color, width=thickness)
            draw.circle(cell.centre, 1.5 * thickness, fill=color)
    for cell in cells.values():
        if cell.kept and groups[cell.output] > 1:
            left, top, right, bottom = cell.box
            frame_box = (left, top, right - 1, bottom - 1)
            draw.rectangle(frame_box, outline=output_color(cell.output), width=2 * thickness)
    return shaded


def side_by_side(
    pictures: Sequence[Image.Image], labels: Sequence[str], *, gap: int = 12
) -> Image.Image:
    """Pictures in a row, each below its label.

    Args:
        pictures: at least one.
        labels: one for each picture.
        gap: pixels around and between the pictures.
    """
    font = ImageFont.load_default(size=18)
    strip = 30
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) + 1)
    height = max(picture.height for picture in pictures) + strip + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for picture, label in zip(pictures, labels, strict=True):
        draw.text((left + picture.width / 2, strip / 2), label, "black", font, anchor="mm")
        sheet.paste(picture.convert("RGB"), (left, strip))
        left += picture.width + gap
    return sheet


def blocks_and_frames(item: ItemReduction) -> list[tuple[int, int]]:
    """The (block, frame) pairs of the picture or clip that have tokens, in order."""
    coords = item.layout.coords[~item.layout.protected]
    return sorted({(int(b), int(t)) for b, t in coords[:, :2].tolist()})


def output_color(output: int) -> Color:
    """The colour of an output; those of near numbers differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb(output * _GOLDEN_ANGLE % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _darken(cell: NDArray[np.float32], output: int) -> None:
    if output < 0:
        cell *= _DROPPED_LIGHT
        return
    cell *= _MERGED_LIGHT
    cell += _TINT * np.asarray(output_color(output), dtype=np.float32)


def _cells(item: ItemReduction, size: tuple[int, int], block: int, frame: int) -> dict[int, _Cell]:
    """The cell of each unprotected token of a block and frame, by its index in the item."""
    coords = item.layout.coords
    shown = (coords[:, 0] == block) & (coords[:, 1] == frame) & ~item.layout.protected
    if not bool(shown.any()):
        raise TokensError(
            f"no tokens to draw in block {block}, frame {frame}; this {item.modality} has tokens "
            f"in (block, frame): {blocks_and_frames(item)}."
        )
    rows, columns = (int(last) + 1 for last in coords[shown][:, 2:].amax(0))
    kept = set(item.kept.tolist())
    width, height = size
    cells = {}
    for index in shown.nonzero().squeeze(1).tolist():
        y, x = coords[index, 2:].tolist()
        box = (
            x * width // columns,
            y * height // rows,
            (x + 1) * width // columns,
            (y + 1) * height // rows,
        )
        cells[index] = _Cell(box, int(item.assignment[index]), index in kept)
    return cells
