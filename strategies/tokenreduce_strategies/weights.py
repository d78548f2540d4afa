"""Weights that a user trained, read from a safetensors file."""

import os
from collections.abc import Mapping
from functools import lru_cache

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tokenreduce.errors import PipelineError


def load_weights(
    path: str,
    shapes: Mapping[str, tuple[int | None, ...]],
    *,
    strategy: str,
    instead: str,
    device: torch.device,
) -> Mapping[str, Tensor]:
    """The named tensors of a file, in float32, read once for each device.

    Args:
        path: of the file; empty if the user gave none.
        shapes: the tensors and their shapes, None where any size will do.
        strategy: its name, for the messages.
        instead: what to use without weights.
        device: where to put them.

    Raises:
        PipelineError: if there is no such file, or it does not hold these tensors.
    """
    if not path:
        raise PipelineError(
            f"{strategy} needs weights that were trained for the model: give "
            f"weights=<file>.safetensors, or use {instead}, which needs none."
        )
    try:
        tensors = _read(path, os.stat(path).st_mtime_ns, device)
    except (OSError, SafetensorError) as error:
        raise PipelineError(f"{strategy}: weights={path!r} cannot be read: {error}") from error
    for name, shape in shapes.items():
        held = tuple(tensors[name].shape) if name in tensors else None
        if (
            held is None
            or len(held) != len(shape)
            or any(want not in (None, have) for want, have in zip(shape, held, strict=True))
        ):
            wanted = " x ".join("any" if size is None else str(size) for size in shape)
            raise PipelineError(
                f"{strategy}: weights={path!r} must hold {name!r} of shape {wanted}, "
                + ("has no such tensor." if held is None else f"got {held}.")
            )
    return tensors


@lru_cache(maxsize=8)
def _read(path: str, changed: int, device: torch.device) -> Mapping[str, Tensor]:
    return {name: tensor.to(device).float() for name, tensor in load_file(path).items()}
