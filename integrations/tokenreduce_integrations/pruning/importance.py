"""How much heads, channels and blocks of a vision encoder matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional

from tokenreduce.errors import MediaError, UnsupportedModel
from tokenreduce_integrations.pruning.encoders import Block, Encoder, Part

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores of an encoder; what scores least goes first.

    Attributes:
        channels: for each part, by its path, ``(channels,)`` scores, float32.
        blocks: ``(blocks,)`` scores, float32.
    """

    channels: Mapping[str, Tensor]
    blocks: Tensor

    def groups(self, part: Part) -> Tensor:
        """``(groups,)`` scores of the heads, or of the channels, of a part."""
        grouped: Tensor = self.channels[part.path].unflatten(0, (part.groups, part.group))
        return grouped.sum(1)


def unknown(encoder: Encoder) -> Importance:
    """Equal scores, for encoders without weights, of which only the shapes matter."""
    parts = [part for block in encoder.blocks for part in _parts(block)]
    channels = {part.path: torch.ones(part.channels) for part in parts}
    return Importance(channels=channels, blocks=torch.ones(len(encoder.blocks)))


def by_magnitude(encoder: Encoder) -> Importance:
    """Squared norms of what belongs to a channel, and of what a block writes.

    A channel owns its rows in the layers that write it and its column in the one that reads it; a
    block is worth what its readers weigh, since they write what the block adds.
    """
    channels: dict[str, Tensor] = {}
    blocks = []
    for block in encoder.blocks:
        total = torch.zeros(())
        for part in _parts(block):
            module = encoder.module.get_submodule(part.path)
            reader = _square(getattr(module, part.reader).weight)
            score = reader.sum(0)
            for name in part.writers:
                rows = _square(getattr(module, name).weight).sum(1)
                score = score + rows.unflatten(0, (-1, part.channels)).sum(0)
            channels[part.path] = score.cpu()
            total = total + reader.sum().cpu()
        blocks.append(total)
    return Importance(channels=channels, blocks=torch.stack(blocks))


@torch.no_grad()
def by_calibration(model: Any, encoder: Encoder, folder: Path, processor: Any) -> Importance:
    """What channels and blocks do on pictures.

    A channel is worth the energy that it hands on, ``sum(x^2) * |column|^2``; a block how far it
    turns its tokens, ``1 - cosine(in, out)`` on average.

    Raises:
        MediaError: if there are no pictures in the folder, or one cannot be read.
        UnsupportedModel: if the model does not encode pictures by itself.
    """
    images = _open_all(folder)
    energy: dict[str, Tensor] = {}
    turns = torch.zeros(len(encoder.blocks))
    calls = 0
    with _watching(encoder, energy, turns):
        for start in range(0, len(images), BATCH):
            _encode(model, encoder, images[start : start + BATCH], processor)
            calls += 1
    channels = {}
    for block in encoder.blocks:
        for part in _parts(block):
            weight = getattr(encoder.module.get_submodule(part.path), part.reader).weight
            channels[part.path] = energy[part.path] * _square(weight).sum(0).cpu()
    return Importance(channels=channels, blocks=turns / calls)


@contextmanager
def _watching(encoder: Encoder, energy: dict[str, Tensor], turns: Tensor) -> Iterator[None]:
    def reads(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen = _square(args[0]).flatten(0, -2).sum(0).cpu()
            energy[path] = energy[path] + seen if path in energy else seen

        return hook

    def turn(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            turns[index] += (1 - cosine).mean().cpu()

        return hook

    handles = []
    for index, block in enumerate(encoder.blocks):
        handles.append(block.module.register_forward_hook(turn(index), with_kwargs=True))
        for part in _parts(block):
            reader = getattr(encoder.module.get_submodule(part.path), part.reader)
            handles.append(reader.register_forward_pre_hook(reads(part.path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encode(model: Any, encoder: Encoder, images: list[Image.Image], processor: Any) -> None:
    owner = model.get_submodule(encoder.owner)
    prepare = getattr(processor, "image_processor", None)
    if prepare is None or not hasattr(owner, "get_image_features"):
        raise UnsupportedModel(
            f"{type(model).__name__} does not encode pictures by get_image_features with the "
            "image processor of its processor: prune by magnitude, without 'calibration'."
        )
    parameter = next(encoder.module.parameters())
    taken = inspect.signature(owner.get_image_features).parameters
    prepared = dict(prepare(images, return_tensors="pt"))
    inputs = {name: value.to(parameter.device) for name, value in prepared.items() if name in taken}
    inputs["pixel_values"] = inputs["pixel_values"].to(parameter.dtype)
    owner.get_image_features(**inputs)


def _open_all(folder: Path) -> list[Image.Image]:
    if not folder.is_dir():
        raise MediaError(f"calibration {str(folder)!r}: no such folder. Give one with pictures.")
    images = []
    for path in sorted(file for file in folder.iterdir() if file.is_file()):
        try:
            with Image.open(path) as opened:
                images.append(opened.convert("RGB"))
        except UnidentifiedImageError:
            continue
        except OSError as error:
            raise MediaError(f"{path}: the picture cannot be read: {error}.") from error
    if not images:
        raise MediaError(f"calibration {str(folder)!r}: holds no pictures.")
    return images


def _parts(block: Block) -> list[Part]:
    return [part for part in (block.attention, block.mlp) if part is not None]


def _square(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square()
