"""What a model saw of a picture or clip, and which pixels each of its visual tokens stands for.

Processors crop, pad, tile and squash pictures, so the pixels are read back from what they gave the
model: the cells of a token grid tile those pixels exactly. Where they cannot be read back, a grid
that shows the whole picture lies over the picture as the user gave it. Tokens without a place in
the picture, such as a Q-Former's, are drawn in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenreduce.attachment import ItemReduction
from tokenreduce.tokens import Layout

#: (left, top, right, bottom) in pixels.
Box = tuple[int, int, int, int]

_STRIP_CELL = 24
_STRIP_COLOR = (150, 160, 175)


@dataclass(frozen=True)
class Panel:
    """A grid of tokens, and what they stand for.

    Attributes:
        label: what the pictures show.
        pictures: of one size; several where a token stands for several frames.
        boxes: the cell of each token, by its index in the item.
    """

    label: str
    pictures: tuple[Image.Image, ...]
    boxes: Mapping[int, Box]


def panels(
    items: Sequence[ItemReduction],
    inputs: Mapping[str, Any],
    frames: Sequence[Image.Image],
    *,
    processor: Any,
    config: Any,
) -> list[list[Panel]]:
    """What the model saw of each visual item of one prompt.

    Args:
        items: what became of the items.
        inputs: what the processor gave the model.
        frames: the pictures, or the frames of the clip, as the user gave them.
        processor: the model's processor.
        config: the model's configuration.

    Returns:
        for each item, one panel for each grid of its tokens.
    """
    images = [item.layout for item in items if item.modality == "image"]
    clips = [item.layout for item in items if item.modality == "video"]
    readers = {
        "image": iter(_images(images, inputs, processor, config)),
        "video": iter(_clips(clips, inputs, processor, config)),
    }
    found = []
    for number, item in enumerate(items):
        seen = next(readers[item.modality])
        if seen is None:
            given = frames if item.modality == "video" else [frames[min(number, len(frames) - 1)]]
            seen = _on_given(item.layout, given)
        found.append(seen)
    return found


def cells(layout: Layout, block: int, frame: int, area: Box) -> dict[int, Box]:
    """The cell of each token of a block and frame in an area that they tile.

    Tokens beyond the grid, such as newlines, have none; neither has a class token.
    """
    coords = layout.coords
    rows, columns = grid_size(layout, block)
    shown = (coords[:, 0] == block) & (coords[:, 1] == frame)
    shown &= (coords[:, 2] < rows) & (coords[:, 3] < columns)
    left, top, right, bottom = area
    width, height = right - left, bottom - top
    places = {}
    # A class token comes before the patch that shares its coordinates.
    for index in shown.nonzero().squeeze(1).tolist():
        y, x = coords[index, 2:].tolist()
        places[y, x] = index
    return {
        index: (
            left + x * width // columns,
            top + y * height // rows,
            left + (x + 1) * width // columns,
            top + (y + 1) * height // rows,
        )
        for (y, x), index in places.items()
    }


def grid_size(layout: Layout, block: int) -> tuple[int, int]:
    """Rows and columns of a block, in tokens."""
    if block in layout.extents:
        return layout.extents[block]
    free = layout.coords[(layout.coords[:, 0] == block) & ~layout.protected]
    if not len(free):
        return 0, 0
    rows, columns = (int(last) + 1 for last in free[:, 2:].amax(0))
    return rows, columns


# -- images ------------------------------------------------------------------------------------


def _images(
    layouts: Sequence[Layout], inputs: Mapping[str, Any], processor: Any, config: Any
) -> list[list[Panel] | None]:
    pixels, grids = inputs.get("pixel_values"), inputs.get("image_grid_thw")
    prepare = getattr(processor, "image_processor", None)
    unknown: list[list[Panel] | None] = [None] * len(layouts)
    if not isinstance(pixels, Tensor) or prepare is None or any(map(_is_line, layouts)):
        return unknown
    pixels = pixels.float().cpu()
    if pixels.ndim == 2 and grids is not None and len(grids) == len(layouts):
        clips = _unpatched(pixels, grids, prepare)
        return [
            None if clip is None else [_whole(layout, "", clip[:1])]
            for layout, clip in zip(layouts, clips, strict=True)
        ]
    if pixels.ndim == 5 and len(pixels) == len(layouts) and "image_sizes" in inputs:
        sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
        return [
            _mosaic(layout, [_picture(tile, prepare) for tile in tiles], size, config)
            for layout, tiles, size in zip(layouts, pixels, sizes, strict=True)
        ]
    if pixels.ndim == 4:
        return _tiles(layouts, pixels, inputs.get("image_sizes"), prepare, config)
    return unknown


def _tiles(
    layouts: Sequence[Layout], pixels: Tensor, sizes: Any, prepare: Any, config: Any
) -> list[list[Panel] | None]:
    """Images of one picture or tile for each block."""
    counts = [1 + int(layout.coords[:, 0].max()) for layout in layouts]
    if sum(counts) != len(pixels):
        return [None] * len(layouts)
    pictures = [_picture(tile, prepare) for tile in pixels]
    if sizes is not None and len(sizes) == len(pictures):
        # Pictures of a batch are padded to the largest.
        pictures = [
            picture.crop((0, 0, int(width), int(height)))
            for picture, (height, width) in zip(pictures, sizes, strict=True)
        ]
    pictures = [_whole_patches(picture, config) for picture in pictures]
    found: list[list[Panel] | None] = []
    start = 0
    for layout, count in zip(layouts, counts, strict=True):
        mine = pictures[start : start + count]
        found.append(
            [_whole(layout, "", mine)] if count == 1 else _tiles_and_thumbnail(layout, mine)
        )
        start += count
    return found


def _tiles_and_thumbnail(layout: Layout, pictures: Sequence[Image.Image]) -> list[Panel]:
    """Tiles put together as they were cut, and the thumbnail that comes last."""
    *tiles, thumbnail = pictures
    rows, columns = _arrangement(tiles, thumbnail)
    width, height = thumbnail.size
    picture = Image.new("RGB", (columns * width, rows * height))
    boxes: dict[int, Box] = {}
    for block, tile in enumerate(tiles):
        left, top = block % columns * width, block // columns * height
        picture.paste(tile, (left, top))
        boxes |= cells(layout, block, 0, (left, top, left + width, top + height))
    label = f"tiles, {rows} x {columns}"
    return [
        Panel(label, (picture,), boxes),
        _whole(layout, "thumbnail", [thumbnail], block=len(tiles)),
    ]


def _arrangement(tiles: Sequence[Image.Image], thumbnail: Image.Image) -> tuple[int, int]:
    """The rows and columns in which the tiles look most like the thumbnail."""
    count, (width, height) = len(tiles), thumbnail.size
    target = np.asarray(thumbnail, dtype=np.float32)

    def distance(shape: tuple[int, int]) -> float:
        rows, columns = shape
        picture = Image.new("RGB", (columns * width, rows * height))
        for index, tile in enumerate(tiles):
            picture.paste(tile, (index % columns * width, index // columns * height))
        small = np.asarray(picture.resize(thumbnail.size), dtype=np.float32)
        return float(np.abs(small - target).mean())

    shapes = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(shapes, key=distance)


def _mosaic(
    layout: Layout, pictures: Sequence[Image.Image], size: Sequence[int], config: Any
) -> list[Panel] | None:
    """The thumbnail that comes first, and the tiles without their padding (LLaVA-NeXT)."""
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    thumbnail = _whole_patches(pictures[0], config)
    whole = _whole(layout, "thumbnail", [thumbnail])
    if 1 not in layout.extents:
        return [_whole(layout, "", [thumbnail])]
    vision = config.vision_config
    side, patch = vision.image_size // vision.patch_size, vision.patch_size
    rows, columns = get_anyres_image_grid_shape(
        tuple(size), config.image_grid_pinpoints, vision.image_size
    )
    if len(pictures) < 1 + rows * columns:
        return None
    picture = Image.new("RGB", (columns * side * patch, rows * side * patch))
    for index, tile in enumerate(pictures[1 : 1 + rows * columns]):
        place = (index % columns * side * patch, index // columns * side * patch)
        picture.paste(tile.crop((0, 0, side * patch, side * patch)), place)
    axes = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    # The model's own function says which patches it takes for padding.
    kept = unpad_image(torch.stack(axes), tuple(size))
    (top, left), (bottom, right) = kept[:, 0, 0].tolist(), (kept[:, -1, -1] + 1).tolist()
    shown = picture.crop((left * patch, top * patch, right * patch, bottom * patch))
    label = f"tiles, {rows} x {columns}"
    return [whole, _whole(layout, label, [shown], block=1)]


# -- clips -------------------------------------------------------------------------------------


def _clips(
    layouts: Sequence[Layout], inputs: Mapping[str, Any], processor: Any, config: Any
) -> list[list[Panel] | None]:
    pixels, grids = inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")
    prepare = getattr(processor, "video_processor", None)
    unknown: list[list[Panel] | None] = [None] * len(layouts)
    if not isinstance(pixels, Tensor) or prepare is None or any(map(_is_line, layouts)):
        return unknown
    pixels = pixels.float().cpu()
    clips: list[list[Image.Image] | None] = []
    if pixels.ndim == 2 and grids is not None:
        clips = _unpatched(pixels, grids, prepare)
    elif pixels.ndim == 5:
        clips = [
            [_whole_patches(_picture(frame, prepare), config) for frame in clip] for clip in pixels
        ]
    if len(clips) != len(layouts):
        return unknown
    return [
        None if clip is None else _moments(layout, clip)
        for layout, clip in zip(layouts, clips, strict=True)
    ]


def _moments(layout: Layout, frames: Sequence[Image.Image]) -> list[Panel] | None:
    """One panel for each moment, with the frames that its tokens stand for."""
    count = 1 + int(layout.coords[:, 1].max())
    if len(frames) % count:
        return None
    each = len(frames) // count
    return [
        _whole(layout, _moment_label(moment, each), frames[moment * each :][:each], frame=moment)
        for moment in range(count)
    ]


def _moment_label(moment: int, each: int) -> str:
    first = moment * each + 1
    return f"frame {first}" if each == 1 else f"frames {first}-{first + each - 1}"


# -- pixels ------------------------------------------------------------------------------------


def _unpatched(pixels: Tensor, grids: Any, prepare: Any) -> list[list[Image.Image] | None]:
    """Frames of images or clips that were cut into patches, those of a merged token together.

    Args:
        pixels: ``(patches, channels * frames * patch * patch)`` of all images, end to end.
        grids: ``(images, 3)`` moments, rows and columns in patches.
        prepare: the image or video processor.
    """
    merge, frames, patch = (
        int(getattr(prepare, name, None) or 0)
        for name in ("merge_size", "temporal_patch_size", "patch_size")
    )
    sizes = torch.as_tensor(grids).tolist()
    if not merge or not frames or pixels.shape[1] != 3 * frames * patch * patch:
        return [None] * len(sizes)
    clips: list[list[Image.Image] | None] = []
    start = 0
    for t, h, w in sizes:
        flat = pixels[start : start + t * h * w]
        start += t * h * w
        parts = flat.reshape(t, h // merge, w // merge, merge, merge, 3, frames, patch, patch)
        whole = parts.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, 3, h * patch, w * patch)
        clips.append([_picture(frame, prepare) for frame in whole])
    return clips


def _picture(values: Tensor, prepare: Any) -> Image.Image:
    """``(3, H, W)`` pixels as a picture, with the processor's normalization undone."""
    if getattr(prepare, "do_normalize", True):
        mean, deviation = (
            torch.tensor(getattr(prepare, name, None) or default)[:, None, None]
            for name, default in (("image_mean", (0.0, 0.0, 0.0)), ("image_std", (1.0, 1.0, 1.0)))
        )
        values = values * deviation + mean
    if getattr(prepare, "do_rescale", True):
        values = values / (getattr(prepare, "rescale_factor", None) or 1 / 255)
    array = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(array.contiguous().numpy())


def _whole_patches(picture: Image.Image, config: Any) -> Image.Image:
    """The picture without the rest beyond its last whole patch, which no token sees."""
    side = getattr(getattr(config, "vision_config", None), "patch_size", None)
    height, width = side if isinstance(side, list | tuple) else (side or 1, side or 1)
    size = picture.width // width * width, picture.height // height * height
    return picture.crop((0, 0, *size)) if min(size) else picture


# -- pictures as they were given, and none -----------------------------------------------------


def _on_given(layout: Layout, given: Sequence[Image.Image]) -> list[Panel]:
    """Grids that show the whole picture, over the picture as the user gave it."""
    places = sorted({(b, t) for b, t in layout.coords[~layout.protected][:, :2].tolist()})
    if _is_line(layout) or not {block for block, _ in places} <= {*layout.extents}:
        return [_strip(len(layout))]
    moments = 1 + max((frame for _, frame in places), default=0)
    found = []
    for block, frame in places:
        label = "" if len(places) == 1 else f"block {block}, frame {frame + 1}"
        shown = given[frame * len(given) // moments]
        found.append(_whole(layout, label, [shown], block=block, frame=frame))
    return found


def _strip(count: int) -> Panel:
    """Tokens without a place, in their order, in lines of equal length."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (columns * _STRIP_CELL, rows * _STRIP_CELL)
    boxes = {
        i: (
            i % columns * _STRIP_CELL,
            i // columns * _STRIP_CELL,
            (i % columns + 1) * _STRIP_CELL,
            (i // columns + 1) * _STRIP_CELL,
        )
        for i in range(count)
    }
    picture = Image.new("RGB", size, _STRIP_COLOR)
    return Panel("tokens in their order; their places are not known", (picture,), boxes)


def _whole(
    layout: Layout,
    label: str,
    pictures: Sequence[Image.Image],
    *,
    block: int = 0,
    frame: int = 0,
) -> Panel:
    area = (0, 0, *pictures[0].size)
    return Panel(label, tuple(pictures), cells(layout, block, frame, area))


def _is_line(layout: Layout) -> bool:
    """Whether tokens have no place; a grid of one row says what it shows."""
    return not layout.extents and layout == Layout.line(len(layout))
