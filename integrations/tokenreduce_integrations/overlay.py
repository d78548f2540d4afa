"""Pictures of what a reduction kept, merged and dropped."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tokenreduce.attachment import ItemReduction
from tokenreduce.errors import TokensError
from tokenreduce_integrations.seen import Box, Panel, cells

Color = tuple[int, int, int]

_DROPPED_LIGHT = 0.22
_MERGED_LIGHT = 0.6
_TINT = 0.18
_GOLDEN_ANGLE = 0.618034
#: Colours of viridis at equal steps: even in brightness, and told apart by the colour-blind.
_HEAT = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32
)
_HEAT_SHARE = 0.65


def draw_overlay(
    image: Image.Image, item: ItemReduction, *, block: int = 0, frame: int = 0, side: int = 384
) -> Image.Image:
    """Draw what became of each token of one grid over the picture that it came from.

    See :func:`draw_panel`. Tokens beyond the grid, such as newlines, are not drawn.

    Args:
        image: the picture, or one frame of the clip, as the model saw it.
        item: what became of its tokens.
        block: the tile or crop to draw.
        frame: the frame to draw.
        side: as for :func:`draw_panel`.

    Raises:
        TokensError: if the item has no tokens in that block and frame.
    """
    boxes = cells(item.layout, block, frame, (0, 0, *_enlarged(image, side).size))
    if not boxes:
        raise TokensError(
            f"no tokens to draw in block {block}, frame {frame}; this {item.modality} has tokens "
            f"in (block, frame): {blocks_and_frames(item)}."
        )
    return _draw(_enlarged(image, side), item, boxes)


def draw_panel(
    panel: Panel,
    item: ItemReduction,
    *,
    picture: int = 0,
    side: int = 384,
    heat: Sequence[float] | None = None,
) -> Image.Image:
    """Draw what became of the tokens of a panel over what they stand for.

    Kept tokens are as bright as the picture. Tokens that were merged are tinted in the colour of
    the output that they flowed into and linked to it where it stands on the same panel; that output
    is framed in the same colour. Dropped tokens are dark.

    Args:
        panel: what the model saw.
        item: what became of its tokens.
        picture: which of the panel's pictures.
        side: small pictures are enlarged by a whole factor until their shorter side reaches this.
        heat: how much each token of the item deserved to stay, from 0 to 1, or NaN; it is drawn as
            colour from dark blue to yellow, with the kept tokens framed, in place of what became of
            the others.
    """
    shown = panel.pictures[picture]
    large = _enlarged(shown, side)
    factor = large.width // shown.width
    boxes = {
        index: (left * factor, top * factor, right * factor, bottom * factor)
        for index, (left, top, right, bottom) in panel.boxes.items()
    }
    return _draw(large, item, boxes) if heat is None else _draw_heat(large, item, boxes, heat)


def heat_of_scores(item: ItemReduction) -> list[float] | None:
    """The rank of each token by the strategy's scores, 0 for the lowest and 1 for the highest.

    NaN stands for tokens that were not scored; None is returned where the strategy scores none.
    """
    if item.reduction is None or item.reduction.scores is None:
        return None
    scores = item.reduction.scores[0].float().cpu()
    asked = ~scores.isnan()
    # Equal scores get equal ranks.
    _, ranks = scores[asked].unique(return_inverse=True)
    heat = torch.full_like(scores, torch.nan)
    heat[asked] = ranks / ranks.max().clamp(min=1)
    return [float(value) for value in heat]


def heat_of_budgets(items: Sequence[ItemReduction]) -> list[float]:
    """The share of budgets under which each token is kept, for strategies that score no tokens.

    Args:
        items: the same visual item, reduced to several budgets.
    """
    counts = torch.zeros(len(items[0].layout))
    for item in items:
        counts[item.kept] += 1
    return [float(share) for share in counts / len(items)]


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], *, columns: int = 4, gap: int = 12
) -> Image.Image:
    """Pictures in rows, each below its label.

    Args:
        pictures: at least one.
        labels: one for each picture.
        columns: most pictures in a row.
        gap: pixels around and between the pictures.
    """
    font, strip = ImageFont.load_default(size=18), 30
    columns = min(columns, len(pictures))
    starts = range(0, len(pictures), columns)
    wide = [
        max(
            max(picture.width, math.ceil(font.getlength(label)))
            for picture, label in zip(pictures[c::columns], labels[c::columns], strict=True)
        )
        for c in range(columns)
    ]
    high = [max(picture.height for picture in pictures[start:][:columns]) for start in starts]
    size = (sum(wide) + gap * (columns + 1), sum(high) + strip * len(high) + gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for start, height in zip(starts, high, strict=True):
        left = gap
        row = zip(pictures[start:][:columns], labels[start:][:columns], wide, strict=False)
        for picture, label, width in row:
            draw.text((left + width / 2, top + strip / 2), label, "black", font, anchor="mm")
            sheet.paste(picture.convert("RGB"), (left + (width - picture.width) // 2, top + strip))
            left += width + gap
        top += strip + height
    return sheet


def side_by_side(
    pictures: Sequence[Image.Image], labels: Sequence[str], *, gap: int = 12
) -> Image.Image:
    """Pictures in one row, each below its label; see :func:`contact_sheet`."""
    return contact_sheet(pictures, labels, columns=len(pictures), gap=gap)


def blocks_and_frames(item: ItemReduction) -> list[tuple[int, int]]:
    """The (block, frame) pairs of the picture or clip that have tokens, in order."""
    coords = item.layout.coords[~item.layout.protected]
    return sorted({(int(b), int(t)) for b, t in coords[:, :2].tolist()})


def output_color(output: int) -> Color:
    """The colour of an output; those of near numbers differ clearly."""
    red, green, blue = colorsys.hsv_to_rgb(output * _GOLDEN_ANGLE % 1, 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def heat_color(heat: float) -> Color:
    """The colour of a value from 0 (dark blue) to 1 (yellow)."""
    place = min(max(heat, 0.0), 1.0) * (len(_HEAT) - 1)
    below = min(int(place), len(_HEAT) - 2)
    red, green, blue = _HEAT[below] + (place - below) * (_HEAT[below + 1] - _HEAT[below])
    return round(float(red)), round(float(green)), round(float(blue))


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    factor = max(1, math.ceil(side / min(picture.size)))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _draw(picture: Image.Image, item: ItemReduction, boxes: Mapping[int, Box]) -> Image.Image:
    kept, outputs = set(item.kept.tolist()), item.assignment.tolist()
    homes = {outputs[index]: _centre(box) for index, box in boxes.items() if index in kept}
    groups = torch.bincount(item.assignment[item.assignment >= 0]).tolist()

    pixels = np.asarray(picture, dtype=np.float32).copy()
    for index, (left, top, right, bottom) in boxes.items():
        if index not in kept:
            _darken(pixels[top:bottom, left:right], outputs[index])
    shaded = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    draw = ImageDraw.Draw(shaded)
    thickness = _thickness(shaded)
    for index, box in boxes.items():
        output = outputs[index]
        if index not in kept and output in homes:
            draw.line((*_centre(box), *homes[output]), fill=output_color(output), width=thickness)
            draw.circle(_centre(box), 1.5 * thickness, fill=output_color(output))
    for index, box in boxes.items():
        if index in kept and groups[outputs[index]] > 1:
            _frame(draw, box, output_color(outputs[index]), 2 * thickness)
    return shaded


def _draw_heat(
    picture: Image.Image, item: ItemReduction, boxes: Mapping[int, Box], heat: Sequence[float]
) -> Image.Image:
    pixels = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32).copy()
    for index, (left, top, right, bottom) in boxes.items():
        if not math.isnan(heat[index]):
            cell = pixels[top:bottom, left:right]
            cell *= 1 - _HEAT_SHARE
            cell += _HEAT_SHARE * np.asarray(heat_color(heat[index]), dtype=np.float32)
    shaded = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(shaded)
    for index in set(item.kept.tolist()) & boxes.keys():
        _frame(draw, boxes[index], (255, 255, 255), _thickness(shaded))
    return shaded


def _darken(cell: NDArray[np.float32], output: int) -> None:
    if output < 0:
        cell *= _DROPPED_LIGHT
        return
    cell *= _MERGED_LIGHT
    cell += _TINT * np.asarray(output_color(output), dtype=np.float32)


def _frame(draw: ImageDraw.ImageDraw, box: Box, color: Color, width: int) -> None:
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)


def _thickness(picture: Image.Image) -> int:
    return max(1, round(min(picture.size) / 320))


def _centre(box: Box) -> tuple[int, int]:
    left, top, right, bottom = box
    return (left + right) // 2, (top + bottom) // 2
