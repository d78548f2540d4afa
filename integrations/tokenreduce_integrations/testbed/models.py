"""The trained testbed models that ship with the package."""

import json
from pathlib import Path
from typing import Any, Final, Literal, overload

import torch
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)

MODEL_NAMES: Final = ("a", "b")
"""Models that see pictures."""
VIDEO_MODEL_NAMES: Final = ("video",)
"""Models that see clips."""


def model_path(name: str) -> Path:
    """Folder of a testbed model, in the format of ``save_pretrained``.

    Args:
        name: One of `MODEL_NAMES` or `VIDEO_MODEL_NAMES`. The vision tower of ``"a"`` was trained
            with a label for each patch, that of ``"b"`` never saw one; ``"video"`` has that of
            ``"b"``.

    Raises:
        ValueError: There is no such model.
    """
    known = (*MODEL_NAMES, *VIDEO_MODEL_NAMES)
    if name not in known:
        raise ValueError(f"no testbed model {name!r}, choose one of {known}")
    return Path(__file__).parent / "data" / name


@overload
def load(  # type: ignore[overload-overlap]  # of several names, only "video" tells the class
    name: Literal["video"], dtype: torch.dtype = torch.float32
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]: ...


@overload
def load(
    name: str = "b", dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]: ...


def load(name: str = "b", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a testbed model in evaluation mode, and its processor, without network access.

    Args:
        name: One of `MODEL_NAMES` or `VIDEO_MODEL_NAMES`.
        dtype: Type of the weights in memory; they are stored in bfloat16.
    """
    folder = model_path(name)
    sees_clips = name in VIDEO_MODEL_NAMES
    kind: Any = (
        LlavaOnevisionForConditionalGeneration if sees_clips else LlavaForConditionalGeneration
    )
    model = kind.from_pretrained(folder, dtype=dtype, local_files_only=True)
    processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        folder, local_files_only=True
    )
    model.eval()
    return model, processor


def card(name: str) -> dict[str, Any]:
    """What is known about a model: training, reported question types, unreduced accuracy."""
    loaded: dict[str, Any] = json.loads((model_path(name) / "card.json").read_text())
    return loaded


def reported_types(name: str) -> tuple[str, ...]:
    """Question types that the model has learned, and that an evaluation may report."""
    return tuple(card(name)["reported_types"])
