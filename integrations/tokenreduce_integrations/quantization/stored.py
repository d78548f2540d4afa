"""Models whose weights are quantized in their files."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import ModelSettings
from tokenreduce.registry import import_target

#: The extra that each method's package comes with.
EXTRA_OF = {"torchao": "quant", "bitsandbytes": "quant", "quanto": "quanto"}

#: Weights of quanto, and how each module of them is quantized.
QUANTO_FILES = QUANTO_WEIGHTS, QUANTO_MAP = ("quanto.safetensors", "quanto.json")
_DEVICES = ("cpu", "cuda")


def stored_method(config: Any) -> str:
    """The method that a model's configuration says its weights are quantized by, or nothing."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return ""
    method = stored["quant_method"] if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def refuse_device(method: str, device: torch.device) -> None:
    """Refuse a device that does not run a method; transformers knows of those not listed here.

    Raises:
        PipelineError: with the devices that would work.
    """
    if method in EXTRA_OF and device.type not in _DEVICES:
        raise PipelineError(
            f"weights quantized by {method} do not run on the device {str(device)!r}. They run on: "
            f"{', '.join(_DEVICES)}. Set model.device to one of them."
        )


def save_weights(model: Any, folder: Path) -> None:
    """Write a model, quantized or not, with its configuration."""
    method = stored_method(model.config)
    # What was saved here before would be read in place of what is saved now.
    for name in QUANTO_FILES:
        (folder / name).unlink(missing_ok=True)
    if method == "quanto":
        # transformers does not write these.
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        _function("quanto:save_weights")(model, folder)
        return
    if method == "bitsandbytes":
        _function("bnb:unpack")(model)
    # What is quantized cannot be renamed to what older versions of transformers called it.
    with _function("ao:readable_names")(model) if method == "torchao" else nullcontext():
        model.save_pretrained(folder, save_original_format=not method)


def load_quanto(own: type[Any], config: Any, folder: Path, settings: ModelSettings) -> Any:
    """Read what :func:`save_weights` wrote of a model that quanto quantized.

    Args:
        own: class that builds the model in the shapes that were stored.
        config: its configuration.
        folder: where it was written.
        settings: how to load it.
    """
    from transformers import GenerationConfig

    stored = config.quantization_config
    kept = torch.get_default_dtype()
    chosen: Any = config.dtype if settings.dtype == "auto" else settings.torch_dtype
    try:
        torch.set_default_dtype(chosen or kept)
        model = own(config)
    finally:
        torch.set_default_dtype(kept)
    if settings.attention is not None:
        model.set_attn_implementation(settings.attention)
    _function("quanto:load_weights")(model, folder, settings.torch_device)
    model.tie_weights()
    model.config.quantization_config = stored
    model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _function(name: str) -> Any:
    """A function of a backend's module, whose package the weights need."""
    module = name.partition(":")[0]
    target = f"tokenreduce_integrations.quantization.{name}"
    extra = "quanto" if module == "quanto" else "quant"
    return import_target(target, what=f"weights quantized by {module}", extra=extra)
