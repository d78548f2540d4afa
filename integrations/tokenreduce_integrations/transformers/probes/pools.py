"""From the patches that a tower sees to the tokens that the LLM sees, by model family.

A pool does to a signal what the model does to features on the way: patches that become one token
are averaged, newlines get zero, padding that the model cuts off is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce_integrations.transformers.tiles import packing_settings, tile_counts

#: (owner, signal ``(T, S, C)`` of T sequences of the tower, projected features ``(N, D)`` of each
#: item, arguments of the encoding call) -> the signal ``(N, C)`` of each item.
Pool = Callable[[Any, Tensor, Sequence[Tensor], Mapping[str, Any]], list[Tensor]]


def patches(
    owner: Any, signal: Tensor, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Patches reach the LLM one by one (LLaVA).

    A class token that the projector was not given comes first in the tower's sequence.
    """
    return [
        row[row.shape[0] - feature.shape[0] :]
        for row, feature in zip(signal, features, strict=True)
    ]


def packed_tiles(
    owner: Any, signal: Tensor, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Thumbnail and unpadded tiles with newlines at line ends (LLaVA-NeXT, LLaVA-OneVision)."""
    packed, _ = owner.pack_image_features(
        signal[:, signal.shape[1] - _tile(owner) :].split(tile_counts(owner, arguments)),
        arguments["image_sizes"],
        image_newline=signal.new_zeros(signal.shape[-1]),
        **packing_settings(owner, arguments),
    )
    return list(packed)


def pooled_frames(
    owner: Any, signal: Tensor, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Frames pooled bilinearly, and one newline at the end of the clip (LLaVA-OneVision)."""
    frames = owner.apply_pooling(signal[:, signal.shape[1] - _tile(owner) :])
    clips = frames.reshape(len(features), -1, frames.shape[-1])
    newline = clips.new_zeros(len(features), 1, clips.shape[-1])
    return list(torch.cat([clips, newline], dim=1))


def shuffled_patches(
    owner: Any, signal: Tensor, features: Sequence[Tensor], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Neighbouring patches become one token of more channels (InternVL)."""
    ratio, channels = owner.config.downsample_ratio, signal.shape[-1]
    group = round(1 / ratio) ** 2
    used = features[0].shape[0] * group
    side = math.isqrt(used)
    tiles = signal[:, signal.shape[1] - used :].reshape(-1, side, side, channels)
    shuffled: Tensor = owner.pixel_shuffle(tiles, scale_factor=ratio)
    return list(shuffled.flatten(1, 2).unflatten(-1, (group, channels)).mean(2))


def merged_patches(modality: str) -> Pool:
    """Patches merged two by two; they come in groups already, by windows if the tower has windows
    (Qwen-VL)."""

    def pool(
        owner: Any, signal: Tensor, features: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[Tensor]:
        tower = owner.visual
        merged = signal[0].unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
        if hasattr(tower, "window_size"):
            from transformers.vision_utils import get_vision_window_index

            order, _ = get_vision_window_index(
                arguments[f"{modality}_grid_thw"],
                spatial_merge_size=tower.spatial_merge_size,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )
            merged = merged[order.argsort().to(merged.device)]
        return list(merged.split([feature.shape[0] for feature in features]))

    return pool


def _tile(owner: Any) -> int:
    """Patches of one picture, tile or frame."""
    vision = owner.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2
