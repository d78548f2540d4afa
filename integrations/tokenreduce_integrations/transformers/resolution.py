"""How many pixels of a picture reach an encoder of native resolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenreduce.errors import PipelineError


class Shrunk(NamedTuple):
    """A picture that a processor made smaller; both as (width, height) in pixels."""

    given: tuple[int, int]
    encoded: tuple[int, int]

    def __str__(self) -> str:
        given, encoded = (f"{width} x {height}" for width, height in self)
        return (
            f"the processor made the picture {encoded} pixels, of {given}. To encode it as it is, "
            f"add model.max_pixels={self.given[0] * self.given[1] * 11 // 10}"
        )


def limit_pixels(processor: Any, pixels: int) -> None:
    """Let a processor leave pictures of up to so many pixels as they are.

    Raises:
        PipelineError: if it has no such limit, or the number is below its least.
    """
    images: Any = getattr(processor, "image_processor", None)
    size = dict(getattr(images, "size", None) or {})
    # Elsewhere the longest edge is a length, or pictures have one size.
    if not hasattr(images, "merge_size") or not size.keys() >= {"shortest_edge", "longest_edge"}:
        raise PipelineError(
            f"max_pixels: the pictures of {type(images).__name__} have one size or are cut into "
            "tiles; only processors of native resolution, such as Qwen-VL's, have a limit in "
            "pixels. Leave max_pixels out."
        )
    if pixels < size["shortest_edge"]:
        raise PipelineError(
            f"max_pixels={pixels}: {type(images).__name__} makes pictures at least "
            f"{size['shortest_edge']} pixels large. Give more."
        )
    images.size = {**size, "longest_edge": pixels}


def shrunk_picture(
    size: tuple[int, int], processor: Any, inputs: Mapping[str, Any]
) -> Shrunk | None:
    """What a processor of native resolution took away of a picture; None if nothing.

    Args:
        size: (width, height) of the picture.
        processor: the model's.
        inputs: what it made of the picture alone.
    """
    grid = inputs.get("image_grid_thw")
    patch = getattr(getattr(processor, "image_processor", None), "patch_size", None)
    if grid is None or not isinstance(patch, int):
        return None
    _, rows, columns = grid[0].tolist()
    encoded = (columns * patch, rows * patch)
    # Sides are rounded to whole tokens, and a picture of odd shape is not made smaller by that.
    if encoded[0] * encoded[1] >= 0.9 * size[0] * size[1]:
        return None
    return Shrunk(size, encoded)
