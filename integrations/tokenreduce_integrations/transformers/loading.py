"""Loading the model that a pipeline names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tokenreduce.attachment import find_adapter
from tokenreduce.backends import find_encoder_pruner, find_quantizer
from tokenreduce.errors import PipelineError, TokenReduceError, did_you_mean
from tokenreduce.pipeline import ModelSettings
from tokenreduce.stage import Stage

TESTBED = "testbed:"

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LONGEST_REASON = 400


def load_model(settings: ModelSettings, stages: Sequence[Stage] = ()) -> tuple[nn.Module, Any]:
    """Load a multimodal model and its processor.

    Code that ships with a model is never run, and pickled weights are refused unless the settings
    allow them. ``testbed:NAME`` is a model that ships with this package.

    Args:
        settings: what to load, and how.
        stages: the stages that will run on it, checked before weights are read.

    Returns:
        the model in evaluation mode on its device, and the processor.

    Raises:
        PipelineError: if the path, the type, the device or the attention cannot be used.
        MissingExtra: if a backend needs a package that is not installed.
        UnsupportedModel: if the model cannot be reduced, or its vision encoder not pruned.
        UnsupportedSite: if a stage's site cannot be served on the model.
        MissingSignal: if a stage needs a signal that the model cannot give.
    """
    device = settings.torch_device
    arguments: dict[str, Any] = {"dtype": settings.torch_dtype}
    if not settings.allow_pickle:
        arguments["use_safetensors"] = True
    if settings.attention is not None:
        arguments["attn_implementation"] = settings.attention
    quantizer, pruner = settings.quantizer, settings.encoder_pruner
    if quantizer is not None:
        backend = find_quantizer(quantizer.backend)
        arguments["device_map"] = str(device)
        arguments |= backend.load_arguments(quantizer.options, device=device)
    prune = None if pruner is None else find_encoder_pruner(pruner.backend)
    path = resolve_path(settings.path)
    if not Path(path).is_dir() and not _HUB_NAME.fullmatch(path):
        raise PipelineError(
            f"model path {path!r}: no such folder. Give a folder that save_pretrained wrote, a hub "
            "name such as 'llava-hf/llava-1.5-7b-hf', or 'testbed:b'."
        )

    # Imported here so that a pipeline which cannot work says so at once.
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    with _explained(settings):
        # The smallest file comes first: without it the others are not worth asking for, and it
        # says whether the stages can run before any weight is read.
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            skeleton = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
        find_adapter(skeleton).check(skeleton, tuple(stages), path, settings.joint_encoder)
        processor = AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call]
        model: nn.Module = AutoModelForImageTextToText.from_pretrained(path, **arguments)
        if "device_map" not in arguments:
            model.to(device)
    model.eval()
    if prune is not None and pruner is not None:
        prune.prune(model, pruner.options)
    return model, processor


def resolve_path(path: str) -> str:
    """The folder of a model that ships with this package, or the path as it is.

    Raises:
        PipelineError: if no such model ships.
    """
    if not path.startswith(TESTBED):
        return path
    from tokenreduce_integrations.testbed.models import MODEL_NAMES, model_path

    name = path.removeprefix(TESTBED)
    if name not in MODEL_NAMES:
        raise PipelineError(
            f"model path {path!r}: there is no testbed model {name!r}. "
            f"{did_you_mean(path, [TESTBED + known for known in MODEL_NAMES])}"
        )
    return str(model_path(name))


@contextmanager
def _explained(settings: ModelSettings) -> Iterator[None]:
    """Say of a failed load which model it was and what can be done."""
    try:
        yield
    except TokenReduceError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PipelineError(
            f"model {settings.path!r} cannot be loaded: {_shortened(reason)}. "
            f"{_remedy(settings, error)}"
        ) from error


def _shortened(reason: str) -> str:
    """Some messages go on to list every model class that exists."""
    if len(reason) <= _LONGEST_REASON:
        return reason.rstrip(".")
    return f"{reason[:_LONGEST_REASON].rpartition(' ')[0]} ..."


def _remedy(settings: ModelSettings, error: Exception) -> str:
    text = str(error)
    if isinstance(error, ImportError) and "torchvision" in text.lower():
        return "Its processor needs torchvision: pip install 'tokenreduce[vision]'"
    if settings.attention is not None and settings.attention.partition("_")[0] in text.lower():
        return "Leave 'attention' out of the model's settings for the library's own choice."
    if "safetensors" in text and not settings.allow_pickle:
        return (
            "If its weights are pickled and you trust where they come from, set "
            "'allow_pickle: true': reading them can run code."
        )
    if isinstance(error, OSError) and not Path(settings.path).exists():
        return (
            "Give a folder that save_pretrained wrote, or the hub name of a model that this "
            "machine can download or has downloaded."
        )
    if isinstance(error, SafetensorError):
        return "The file is damaged or was not copied in full: fetch it again."
    if isinstance(error, RuntimeError):
        return f"Check that the device {settings.device!r} exists and has the memory."
    return "Give a multimodal model that transformers can load without code of its own."
