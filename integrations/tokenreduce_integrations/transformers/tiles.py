"""How LLaVA-NeXT and LLaVA-OneVision cut pictures into tiles, and what their packing is told."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def tile_count(owner: Any, size: Any) -> int:
    """Tiles of a picture of a size ``(height, width)``, its thumbnail among them."""
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        image_size_to_num_patches,
    )

    count: int = image_size_to_num_patches(
        image_size=size,
        grid_pinpoints=owner.config.image_grid_pinpoints,
        patch_size=owner.config.vision_config.image_size,
    )
    return count


def tile_counts(owner: Any, arguments: Mapping[str, Any]) -> list[int]:
    """Tiles of each picture of an encoding call.

    Several pictures of one prompt are left whole (LLaVA-OneVision).
    """
    sizes = arguments["image_sizes"]
    pictures = arguments.get("batch_num_images")
    whole = [False] * len(sizes)
    if pictures is not None:
        whole = [int(n) != 1 for n in pictures for _ in range(int(n))]
    return [
        1 if as_one else tile_count(owner, size) for size, as_one in zip(sizes, whole, strict=True)
    ]


def packing_settings(owner: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What ``pack_image_features`` takes beside features, sizes and newline in a call."""
    accepted = inspect.signature(owner.pack_image_features).parameters
    return {
        name: arguments.get(name) or getattr(owner.config, name, None)
        for name in ("vision_aspect_ratio", "vision_feature_select_strategy")
        if name in accepted
    }
