"""Vision encoders that were pruned elsewhere, from a file of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from tokenreduce.errors import PipelineError, UnsupportedModel
from tokenreduce_integrations.pruning import options as option
from tokenreduce_integrations.pruning.encoders import Encoder, Part, find_encoder
from tokenreduce_integrations.pruning.planning import make_plan
from tokenreduce_integrations.pruning.surgery import SurgeryPlan


class PrunedCheckpoint:
    """The weights of a whole, smaller encoder, whose shapes say what was cut.

    Options:
        weights: a safetensors file with the encoder's state, under its own names or with a prefix
            such as ``vision_tower.``; blocks are numbered from 0 without gaps.
    """

    known = ("weights",)

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        option.refuse_unknown(options, self.known)
        path = Path(option.text(options, "weights"))
        _plan(model, find_encoder(model), _shapes(path), path)

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        option.refuse_unknown(options, self.known)
        path = Path(option.text(options, "weights"))
        encoder = find_encoder(model)
        names = _own_names(encoder, _shapes(path), path)
        _plan(model, encoder, _shapes(path), path).apply(model)
        if next(encoder.module.parameters()).is_meta:
            return
        state = {own: load for name, load in load_file(path).items() if (own := names.get(name))}
        try:
            encoder.module.load_state_dict(state)
        except RuntimeError as error:
            raise UnsupportedModel(f"{path}: does not fit {encoder.path}: {error}.") from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise PipelineError(
            f"{option.WHERE}.weights: {str(path)!r} cannot be read: {error}. Give a safetensors "
            "file with the state of the encoder."
        ) from error


def _own_names(
    encoder: Encoder, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, str]:
    """The encoder's own name for each name in the file.

    The file may put a prefix before them, and may lack one where a wrapper holds the encoder.
    """
    steps = encoder.blocks_path.split(".")
    for depth in range(len(steps)):
        lead = "".join(f"{step}." for step in steps[:depth])
        pattern = re.compile(rf"((?:.*\.)?){re.escape('.'.join(steps[depth:]))}\.\d+\.")
        for name in shapes:
            if found := pattern.match(name):
                prefix = found[1]
                return {
                    name: lead + name.removeprefix(prefix)
                    for name in shapes
                    if name.startswith(prefix)
                }
    raise UnsupportedModel(
        f"{option.WHERE}.weights: {str(path)!r} holds no {encoder.blocks_path}.0.*: these are not "
        f"the weights of {encoder.path} ({type(encoder.module).__name__})."
    )


def _plan(
    model: nn.Module, encoder: Encoder, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> SurgeryPlan:
    own = {mine: shapes[name] for name, mine in _own_names(encoder, shapes, path).items()}
    start = f"{encoder.blocks_path}."
    numbers = {int(n.removeprefix(start).split(".")[0]) for n in own if n.startswith(start)}
    if numbers != set(range(len(numbers))) or len(numbers) > len(encoder.blocks):
        raise UnsupportedModel(
            f"{path}: holds the blocks {sorted(numbers)}, not the first ones of the "
            f"{len(encoder.blocks)} of {encoder.path}. Number them from 0 without gaps."
        )
    parts = [
        part
        for index in sorted(numbers)
        for part in (encoder.blocks[index].attention, encoder.blocks[index].mlp)
        if part is not None
    ]
    kept = {part.path: range(_groups(part, own, path)) for part in parts}
    return make_plan(
        model,
        encoder,
        kept_blocks=sorted(numbers),
        kept_groups={p.path: kept[p.path] for p in parts if len(kept[p.path]) < p.groups},
        record={"backend": "checkpoint", "weights": str(path)},
    )


def _groups(part: Part, own: Mapping[str, tuple[int, ...]], path: Path) -> int:
    """How many of a part's groups of channels the file has."""
    name = f"{part.path}.{part.reader}.weight"
    shape = own.get(name)
    if shape is None or shape[1] % part.group or not 0 < shape[1] <= part.channels:
        raise UnsupportedModel(
            f"{path}: {name} has the shape {shape}; {part.channels} columns or fewer are needed, "
            f"in whole groups of {part.group}."
        )
    return shape[1] // part.group
