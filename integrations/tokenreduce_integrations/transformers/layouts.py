"""Where each visual token lies in the picture or clip that the user supplied, by model family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.tiles import packing_settings, tile_count

#: Layouts of packed images by owner: asking a model's packing costs more than all else here.
_PACKED: WeakKeyDictionary[Any, dict[object, Layout]] = WeakKeyDictionary()


def grid_layout(grid: Sequence[int], count: int) -> Layout:
    """A full grid if it holds ``count`` tokens, else a line."""
    fits = math.prod(grid) == count and min(grid) > 0
    return Layout.from_grid(grid) if fits else Layout.line(count)


def square_patches(
    owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Layout]:
    """Patches of whole images (LLaVA): rows and columns of the vision tower's grid.

    A class token that the projector passed on comes first and is protected.
    """
    patch = _patch_side(owner)
    pixels = arguments["pixel_values"]
    sizes = arguments.get("image_sizes")
    layouts = []
    for index, feature in enumerate(features):
        height, width = sizes[index] if sizes is not None else pixels.shape[-2:]
        grid = (int(height) // patch, int(width) // patch)
        count = feature.shape[0]
        if grid[0] * grid[1] == count - 1:
            layouts.append(_with_class_token(Layout.from_grid(grid)))
        else:
            layouts.append(grid_layout(grid, count))
    return layouts


def _patch_side(owner: Any) -> int:
    config = owner.config.vision_config
    if hasattr(config, "patch_size"):
        return int(config.patch_size)
    # The configuration of a timm tower does not say, but the tower does.
    return int(owner.vision_tower.timm_model.patch_embed.patch_size[0])


def packed_tiles(
    owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Layout]:
    """A thumbnail (block 0) and the unpadded mosaic of tiles (block 1) with newlines at line ends
    (LLaVA-NeXT, LLaVA-OneVision).

    The model's own packing is asked once for each size of image where the lines end, with a marker
    for the newline; newlines are protected.
    """
    vision = owner.config.vision_config
    side = vision.image_size // vision.patch_size
    sizes = torch.as_tensor(arguments["image_sizes"])
    settings = packing_settings(owner, arguments)
    known = _PACKED.setdefault(owner, {})
    layouts = []
    for index, (feature, size) in enumerate(zip(features, sizes.tolist(), strict=True)):
        count = feature.shape[0]
        key = (*size, count, *settings.values())
        if key not in known:
            newline = _newlines(owner, sizes[index : index + 1], side, count, settings)
            known[key] = Layout.line(count) if newline is None else _mosaic_layout(side, newline)
        layouts.append(known[key])
    return layouts


def pooled_frames(
    owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Layout]:
    """Pooled frames of a clip (LLaVA-NeXT-Video), perhaps with one newline at the end
    (LLaVA-OneVision), which is protected."""
    frames = arguments["pixel_values_videos"].shape[1]
    layouts = []
    for feature in features:
        count = feature.shape[0]
        side = math.isqrt(count // frames)
        cells = frames * side * side
        if cells == count - 1:
            layouts.append(_with_newline(Layout.from_grid((frames, side, side))))
        else:
            layouts.append(grid_layout((frames, side, side), count))
    return layouts


def square_tiles(
    owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Layout]:
    """Square pictures or tiles, one for each entry (InternVL)."""
    sides = (math.isqrt(feature.shape[0]) for feature in features)
    return [
        grid_layout((side, side), feature.shape[0])
        for side, feature in zip(sides, features, strict=True)
    ]


def merged_patches(modality: str) -> Any:
    """Patches merged two by two, with the grid given beside the pixels (Qwen-VL)."""

    def layouts(
        owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[Layout]:
        merge = owner.config.vision_config.spatial_merge_size
        grids = arguments[f"{modality}_grid_thw"].tolist()
        return [
            grid_layout((t, h // merge, w // merge), feature.shape[0])
            for (t, h, w), feature in zip(grids, features, strict=True)
        ]

    return layouts


def given_grid(modality: str) -> Any:
    """Patches merged by a whole factor in each direction, with the grid given beside the pixels;
    without it a line."""

    def layouts(
        owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[Layout]:
        grids = arguments.get(f"{modality}_grid_thw")
        if grids is None or len(grids) != len(features):
            return [Layout.line(feature.shape[0]) for feature in features]
        vision = getattr(owner.config, "vision_config", None)
        frames = getattr(vision, "temporal_merge_size", 1) if modality == "video" else 1
        return [
            _merged_grid((t // frames, h, w), feature.shape[0])
            for (t, h, w), feature in zip(grids.tolist(), features, strict=True)
        ]

    return layouts


def sized_patches(
    owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Layout]:
    """Images of their own size, patches merged by a factor (Pixtral encoders)."""
    config = owner.config
    unit = config.vision_config.patch_size * config.spatial_merge_size
    return [
        grid_layout((int(height) // unit, int(width) // unit), feature.shape[0])
        for (height, width), feature in zip(arguments["image_sizes"], features, strict=True)
    ]


def _merged_grid(grid: Sequence[int], count: int) -> Layout:
    t, h, w = grid
    merge = math.isqrt(t * h * w // count) if count else 0
    if merge == 0:
        return Layout.line(count)
    return grid_layout((t, h // merge, w // merge), count)


def _with_class_token(patches: Layout) -> Layout:
    first = torch.zeros(1, 4, dtype=torch.long)
    guarded = torch.arange(len(patches) + 1) == 0
    return Layout(torch.cat([first, patches.coords]), guarded, extents=patches.extents)


def _with_newline(tokens: Layout) -> Layout:
    end = tokens.coords[-1:] + torch.tensor([[0, 0, 0, 1]])
    guarded = torch.arange(len(tokens) + 1) == len(tokens)
    return Layout(torch.cat([tokens.coords, end]), guarded, extents=tokens.extents)


def _newlines(
    owner: Any, size: Any, side: int, count: int, settings: Mapping[str, Any]
) -> Tensor | None:
    """``(count,)`` which tokens of a packed image are newlines; None if packing says otherwise."""
    for blocks in (tile_count(owner, size[0]), 1):
        packed = owner.pack_image_features(
            [torch.zeros(blocks, side * side, 1)],
            size,
            image_newline=torch.ones(1),
            **settings,
        )[0][0]
        if packed.shape[0] == count:
            newline: Tensor = packed[:, 0] > 0.5
            return newline
    return None


def _mosaic_layout(side: int, newline: Tensor) -> Layout:
    thumbnail = Layout.from_grid((side, side))
    rest = newline[side * side :]
    if rest.numel() == 0:
        return thumbnail
    if rest.numel() == 1:
        return _with_newline(thumbnail)
    line_length = int(rest.nonzero()[0]) + 1
    place = torch.arange(rest.numel())
    mosaic = torch.stack(
        [
            torch.ones_like(place),
            torch.zeros_like(place),
            place // line_length,
            place % line_length,
        ],
        dim=1,
    )
    extents = {0: (side, side), 1: (rest.numel() // line_length, line_length - 1)}
    return Layout(torch.cat([thumbnail.coords, mosaic]), newline, extents=extents)


def joined_tiles(tiles: Sequence[Layout]) -> Layout:
    """Tiles of one picture, each a block; the last of several shows the whole picture."""
    if len(tiles) == 1:
        return tiles[0]
    coords = torch.cat([tile.coords for tile in tiles])
    coords[:, 0] = torch.arange(len(tiles)).repeat_interleave(
        torch.tensor([len(tile) for tile in tiles])
    )
    extents = {len(tiles) - 1: whole for whole in tiles[-1].extents.values()}
    return Layout(coords, torch.cat([tile.protected for tile in tiles]), extents=extents)
