"""What the quantization backends share: which scheme, on which device, of which modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokenreduce.errors import PipelineError, did_you_mean
from tokenreduce_integrations.pruning.encoders import ENCODER_PATHS
from tokenreduce_integrations.transformers.families import find_decoder

WHERE = "model.quantization"
PARTS = ("language_model", "vision_encoder", "projector")


def scheme_on(
    backend: str,
    options: Mapping[str, Any],
    devices: Mapping[str, Sequence[str]],
    device: torch.device,
) -> str:
    """The scheme that the options name, if the device runs it.

    Args:
        backend: name of the backend, for errors.
        options: with the key ``scheme``.
        devices: for each scheme, the types of the devices that run it.
        device: where the model will be.

    Raises:
        PipelineError: if there is no such scheme, or the device does not run it, with what would.
    """
    scheme = options.get("scheme")
    if not isinstance(scheme, str) or scheme not in devices:
        raise PipelineError(
            f"{WHERE}.scheme: backend {backend!r} has no scheme {scheme!r}. "
            f"{did_you_mean(str(scheme), devices)}"
        )
    if device.type not in devices[scheme]:
        here = [name for name, types in devices.items() if device.type in types]
        would = (
            f"On this device: {', '.join(here)}."
            if here
            else f"It runs on: {', '.join(devices[scheme])}. Set model.device to one of them, or "
            "leave out quantization."
        )
        raise PipelineError(
            f"{WHERE}.scheme: {scheme!r} of {backend!r} does not run on the device "
            f"{str(device)!r}. {would}"
        )
    return scheme


def quantized_linears(model: nn.Module, options: Mapping[str, Any]) -> dict[str, nn.Linear]:
    """The linear layers that the option ``modules`` chooses, by path; the head never is one.

    Args:
        model: with or without weights.
        options: ``modules`` is one or several of ``language_model`` (the default),
            ``vision_encoder`` and ``projector``.

    Raises:
        PipelineError: if it is anything else.
        UnsupportedModel: if the model has no text decoder behind an encoder.
    """
    chosen = options.get("modules", PARTS[0])
    chosen = (chosen,) if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list | tuple) or not chosen:
        raise PipelineError(f"{WHERE}.modules: one or several of {', '.join(PARTS)}.")
    for part in chosen:
        if part not in PARTS:
            raise PipelineError(f"{WHERE}.modules: {part!r}. {did_you_mean(str(part), PARTS)}")
    get_head: Any = model.get_output_embeddings
    head, decoder = get_head(), find_decoder(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and _part_of(name, path_of(model, decoder)) in chosen
    }


def modules_to_skip(model: nn.Module, quantized: Mapping[str, nn.Linear]) -> list[str]:
    """Paths that cover every linear layer but the quantized ones, as few as possible."""
    wanted = {prefix for name in quantized for prefix in _prefixes(name)}
    skipped: dict[str, None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in quantized:
            continue
        skipped[next(prefix for prefix in _prefixes(name) if prefix not in wanted)] = None
    return list(skipped)


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module in a model."""
    return next(str(name) for name, found in model.named_modules() if found is module)


def _prefixes(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[:n]) for n in range(1, len(steps) + 1)]


def _part_of(name: str, decoder: str) -> str:
    if name.startswith(f"{decoder}."):
        return "language_model"
    if any(name.startswith(f"{path}.") for path in ENCODER_PATHS):
        return "vision_encoder"
    return "projector"
