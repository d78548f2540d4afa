"""Loading the model that a pipeline names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tokenreduce.attachment import find_adapter
from tokenreduce.backends import (
    EncoderPruner,
    Quantizer,
    find_encoder_pruner,
    find_quantizer,
)
from tokenreduce.errors import PipelineError, TokenReduceError, UnsupportedModel
from tokenreduce.pipeline import ModelSettings
from tokenreduce.stage import Stage
from tokenreduce_integrations.pruning.surgery import (
    SurgeryPlan,
    cut_class,
    plan_of,
    restore_class,
)
from tokenreduce_integrations.pruning.timm_tower import adapt_timm_tower
from tokenreduce_integrations.quantization.stored import (
    EXTRA_OF,
    QUANTO_FILES,
    load_quanto,
    refuse_device,
    stored_method,
)
from tokenreduce_integrations.transformers.files import PLAN_FILE, find_file, resolve_path
from tokenreduce_integrations.transformers.resolution import limit_pixels
from tokenreduce_integrations.transformers.skeleton import skeleton_of

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_LONGEST_REASON = 400
#: What transformers raises for files that are missing, damaged, or hold something else.
_FAILURES = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    KeyError,
    AttributeError,
    TypeError,
    SafetensorError,
)
#: What transformers says to do about weights of other shapes, which would make them random.
_MISMATCH = "ignore_mismatched_sizes"


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
        PipelineError: if the path, the type, the device, the attention or a backend's option cannot
            be used.
        MissingExtra: if a backend needs a package that is not installed.
        UnsupportedModel: if the model cannot be reduced, or its vision encoder not pruned.
        UnsupportedSite: if a stage's site cannot be served on the model.
        MissingSignal: if a stage needs a signal that the model cannot give.
    """
    # Looked up first: a package that is missing should be known before anything is read.
    prune, quantize = _pruning(settings), _quantization(settings)
    path = _require_path(settings)
    from transformers import AutoProcessor

    with _explained(settings):
        skeleton, plan = _skeleton(path, settings, stages)
        config = skeleton.config
        own = type(skeleton)
        stored = own if plan is None else cut_class(own, plan)
        arguments = _arguments(config, settings)
        if prune is not None:
            prune.backend.check(skeleton, prune.options)
        chosen = {} if quantize is None else quantize(skeleton)
        processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            path, trust_remote_code=False
        )
        if settings.max_pixels is not None:
            limit_pixels(processor, settings.max_pixels)
        by_quanto = [find_file(path, name) for name in QUANTO_FILES]
        if by_quanto[0] is not None:
            model = load_quanto(stored, config, by_quanto[0].parent, settings)
        elif prune is None or quantize is None:
            model = _read(stored, path, {**arguments, **chosen}, settings.torch_device, plan)
            if prune is not None:
                prune(model, processor)
        else:
            # Weights are quantized on their way in, so they are pruned in memory before.
            # There, kernels for other devices would be of no use.
            whole = {k: v for k, v in arguments.items() if k != "attn_implementation"}
            model = _read(stored, path, whole, torch.device("cpu"))
            prune(model, processor)
            model = _quantized_copy(model, {**arguments, **quantize(model)}, settings)
    restore_class(model, own)
    adapt_timm_tower(model)
    return model.eval(), processor


def load_skeleton(settings: ModelSettings, stages: Sequence[Stage] = ()) -> Any:
    """The model that would be loaded, pruned but without weights (meta device).

    Args:
        settings: as for :func:`load_model`; weights are not quantized.
        stages: likewise.

    Raises:
        UnsupportedModel: also if its pruner does not work without weights.
        TokenReduceError: as for :func:`load_model`.
    """
    prune = _pruning(settings)
    path = _require_path(settings)
    with _explained(settings):
        skeleton, _ = _skeleton(path, settings, stages)
        if prune is not None:
            prune.backend.check(skeleton, prune.options)
            try:
                prune(skeleton, None)
            except NotImplementedError as error:
                # What torch says of reading a tensor that is not there.
                raise UnsupportedModel(
                    f"encoder pruner {type(prune.backend).__name__} judges by weights how much "
                    "leaves: without them nothing is known of the pruned encoder. Load the model."
                ) from error
    return skeleton


def _require_path(settings: ModelSettings) -> str:
    """The path, if there may be a model."""
    path = resolve_path(settings.path)
    if not Path(path).is_dir() and not _HUB_NAME.fullmatch(path):
        raise PipelineError(
            f"model path {path!r}: no such folder. Give a folder that save_pretrained wrote, a hub "
            "name such as 'llava-hf/llava-1.5-7b-hf', or 'testbed:b'."
        )
    return path


def _skeleton(
    path: str, settings: ModelSettings, stages: Sequence[Stage]
) -> tuple[Any, SurgeryPlan | None]:
    """The stored model without its weights, on which the stages were checked, and its plan.

    The smallest files come first: without them the others are not worth asking for, and they say
    whether the stages can run before any weight is read.
    """
    # Imported here so that a pipeline which cannot work says so at once.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if settings.dtype != "auto":
        config.dtype = settings.torch_dtype
    plan = _plan_of(path, settings)
    skeleton = skeleton_of(config, plan)
    find_adapter(skeleton).check(skeleton, tuple(stages), path, settings.joint_encoder)
    adapt_timm_tower(skeleton)
    return skeleton, plan


def _plan_of(path: str, settings: ModelSettings) -> SurgeryPlan | None:
    """The plan that the stored weights were cut by, or None."""
    file = find_file(path, PLAN_FILE)
    if file is None:
        return None
    if settings.encoder_pruner is not None:
        raise PipelineError(
            f"model path {path!r}: its vision encoder was pruned before it was saved. Leave out "
            "vision_encoder, or prune more of the original model at once."
        )
    return SurgeryPlan.read(file)


def _arguments(config: Any, settings: ModelSettings) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a model as it was stored.

    Raises:
        PipelineError: if it is quantized, and should be quantized or pruned once more.
    """
    arguments: dict[str, Any] = {"dtype": settings.torch_dtype}
    if not settings.allow_pickle:
        arguments["use_safetensors"] = True
    if settings.attention is not None:
        arguments["attn_implementation"] = settings.attention
    method = stored_method(config)
    if method:
        refuse_device(method, settings.torch_device)
        for given, what in ((settings.quantizer, "quantized"), (settings.encoder_pruner, "pruned")):
            if given is not None:
                raise PipelineError(
                    f"model {settings.path!r} is quantized already ({method}): it cannot be {what} "
                    "any more. Start from the weights that it was quantized from: encoders are "
                    "pruned first, then weights are quantized."
                )
        arguments["device_map"] = str(settings.torch_device)
    return arguments


@dataclass(frozen=True)
class _Pruning:
    """A pruner with its options."""

    backend: EncoderPruner
    options: Mapping[str, Any]

    def __call__(self, model: Any, processor: Any) -> None:
        adapt_timm_tower(model)
        self.backend.prune(model.eval(), self.options, processor)


def _pruning(settings: ModelSettings) -> _Pruning | None:
    pruner = settings.encoder_pruner
    if pruner is None:
        return None
    return _Pruning(find_encoder_pruner(pruner.backend), pruner.options)


@dataclass(frozen=True)
class _Quantization:
    """A quantizer with its options."""

    backend: Quantizer
    options: Mapping[str, Any]
    device: torch.device

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        given = self.backend.load_arguments(self.options, device=self.device, model=model)
        return {"device_map": str(self.device), **given}


def _quantization(settings: ModelSettings) -> _Quantization | None:
    quantizer = settings.quantizer
    if quantizer is None:
        return None
    backend = find_quantizer(quantizer.backend)
    return _Quantization(backend, quantizer.options, settings.torch_device)


def _read(
    own: type[Any],
    path: str,
    arguments: Mapping[str, Any],
    device: torch.device,
    plan: SurgeryPlan | None = None,
) -> Any:
    model, found = own.from_pretrained(path, output_loading_info=True, **arguments)
    if plan is not None:
        # Blocks that only one of plan and file has would be left out, or have random weights.
        strange = {*found["missing_keys"], *found["unexpected_keys"]}
        mine = sorted(name for name in strange if name.startswith(f"{plan.encoder}."))
        if mine:
            raise UnsupportedModel(
                f"{path}: {PLAN_FILE} is not the plan of these weights: they disagree about "
                f"{mine[0]} and {len(mine) - 1} more. Take the one that was saved with them."
            )
    return model if "device_map" in arguments else model.to(device)


def _quantized_copy(model: Any, arguments: Mapping[str, Any], settings: ModelSettings) -> Any:
    """The model loaded once more from memory, quantized on the way.

    Raises:
        PipelineError: if its pruner left no plan by which it can be built again.
    """
    plan = plan_of(model)
    if plan is None:
        backend = settings.encoder_pruner and settings.encoder_pruner.backend
        raise PipelineError(
            f"encoder pruner {backend!r} left no surgery plan, so that what it pruned cannot be "
            "quantized. It has to cut by SurgeryPlan.apply."
        )
    copied = cut_class(type(model), plan).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), **arguments
    )
    copied.generation_config = model.generation_config
    return copied


@contextmanager
def _explained(settings: ModelSettings) -> Iterator[None]:
    """Say of a failed load which model it was and what can be done."""
    try:
        yield
    except TokenReduceError:
        raise
    except _FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if _MISMATCH in reason:
            reason = "its weights have other shapes than the model that they are for"
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
    if _MISMATCH in text:
        return (
            f"If its vision encoder was pruned, the {PLAN_FILE} that was written beside the "
            "weights is missing, or is that of another model."
        )
    if isinstance(error, ImportError) and "torchvision" in text.lower():
        return "Its processor needs torchvision: pip install 'tokenreduce[vision]'"
    if isinstance(error, ImportError) and any(name in text for name in EXTRA_OF):
        extra = next(extra for name, extra in EXTRA_OF.items() if name in text)
        return f"Its quantization needs a package: pip install 'tokenreduce[{extra}]'"
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
    if isinstance(error, ImportError):
        return "Install that package, or give weights that need none."
    if isinstance(error, SafetensorError):
        return "The file is damaged or was not copied in full: fetch it again."
    if isinstance(error, RuntimeError):
        return f"Check that the device {settings.device!r} exists and has the memory."
    return "Give a multimodal model that transformers can load without code of its own."
