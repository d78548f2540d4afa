"""Pipelines: stages, and how the model they run on is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from tokenreduce.errors import PipelineError, did_you_mean
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.stage import Stage

#: What a saved pipeline is called in its folder.
PIPELINE_FILE = "pipeline.yaml"

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class BackendSettings:
    """A backend by name, and what it is told.

    Attributes:
        backend: the registered name.
        options: everything else that was given.
    """

    backend: str
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded. Everything that can be checked without the model is checked here.

    Attributes:
        path: a local folder or a hub name.
        adapter: name of the model adapter whose loader is used.
        dtype: ``"auto"`` for that of the stored weights, or the name of a torch type, such as
            ``"bfloat16"``.
        device: a torch device, or ``"auto"`` for CUDA where there is one.
        attention: the attention implementation, or None for the library's choice.
        allow_pickle: whether weights that are not safetensors may be read. Pickled weights can run
            code.
        quantization: ``{"backend": name, ...}`` or None; a registered quantizer.
        vision_encoder: ``{"prune": {"backend": name, ...}}`` or None; a registered encoder pruner.
        joint_encoder: a folder or a hub name of the vision-text encoder that the model took its
            vision tower from, for stages that compare image and prompt in its space.
        max_pixels: most pixels of a picture that a processor of native resolution leaves as they
            are, or None for the processor's own limit.

    Raises:
        PipelineError: if a value is out of range.
        UnknownName: if no plugin registered the adapter or a backend.
    """

    path: str
    adapter: str = "transformers"
    dtype: str = "auto"
    device: str = "auto"
    attention: str | None = None
    allow_pickle: bool = False
    quantization: Mapping[str, Any] | None = None
    vision_encoder: Mapping[str, Any] | None = None
    joint_encoder: str | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise PipelineError(f"path must be a folder or a hub name, got {self.path!r}.")
        for option in ("dtype", "device"):
            if not isinstance(getattr(self, option), str):
                raise PipelineError(
                    f"{option} must be a name, such as 'auto', got {getattr(self, option)!r}."
                )
        if self.joint_encoder is not None and not (
            isinstance(self.joint_encoder, str) and self.joint_encoder
        ):
            raise PipelineError(
                f"joint_encoder must be a folder or a hub name, got {self.joint_encoder!r}."
            )
        pixels = self.max_pixels
        if pixels is not None and (type(pixels) is not int or pixels < 1):
            raise PipelineError(f"max_pixels must be a positive number of pixels, got {pixels!r}.")
        found = getattr(torch, self.dtype, None) if self.dtype != "auto" else torch.float32
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise PipelineError(
                f"dtype {self.dtype!r} is no floating point type of torch. "
                f"{did_you_mean(self.dtype, DTYPES)}"
            )
        try:
            torch.device(self.device if self.device != "auto" else "cpu")
        except RuntimeError as error:
            raise PipelineError(
                f"device {self.device!r} is no torch device: use 'auto', 'cpu', 'cuda' or 'cuda:0'."
            ) from error
        known = installed()
        # Looking the names up is what checks them.
        _ = known.model_adapters[self.adapter]
        if (quantizer := self.quantizer) is not None:
            _ = known.quantizers[quantizer.backend]
        if (pruner := self.encoder_pruner) is not None:
            _ = known.encoder_pruners[pruner.backend]

    @property
    def torch_dtype(self) -> torch.dtype | Literal["auto"]:
        """The type to load the weights in."""
        return "auto" if self.dtype == "auto" else getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """The device, with ``"auto"`` resolved for this machine."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def quantizer(self) -> BackendSettings | None:
        """The quantization backend, or None.

        Raises:
            PipelineError: if ``quantization`` is not a mapping with the key ``backend``.
        """
        if self.quantization is None:
            return None
        return _backend("quantization", self.quantization)

    @property
    def encoder_pruner(self) -> BackendSettings | None:
        """The encoder-pruning backend, or None.

        Raises:
            PipelineError: if ``vision_encoder`` is not ``{"prune": {"backend": ...}}``.
        """
        settings = self.vision_encoder
        if settings is None:
            return None
        if not isinstance(settings, Mapping):
            raise PipelineError(
                f"vision_encoder must be a mapping like {{prune: {{backend: ...}}}}, got "
                f"{settings!r}."
            )
        for key in settings:
            if key != "prune":
                raise PipelineError(
                    f"vision_encoder has no key {key!r}. {did_you_mean(str(key), ['prune'])}"
                )
        prune = settings.get("prune")
        return None if prune is None else _backend("vision_encoder.prune", prune)


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """An ordered list of stages, and the model that they run on.

    Attributes:
        stages: at least one; a bare reducer is taken as a stage at the projector site.
        model: how to load the model; None for a pipeline that is attached to a live one.
        variables: what ``vars`` held in the file, for the record.
        source: where it came from, for error messages; equal pipelines may differ in it.

    Raises:
        PipelineError: if there is no stage, or something is neither stage nor reducer.
    """

    stages: tuple[Stage, ...]
    model: ModelSettings | None = None
    variables: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        name = self.source or "pipeline"
        if not isinstance(self.stages, tuple | list):
            raise PipelineError(f"{name}: stages must be a tuple, got {self.stages!r}.")
        stages = []
        for given in self.stages:
            stage = Stage(reducer=given) if isinstance(given, Reducer) else given
            if not isinstance(stage, Stage):
                raise PipelineError(
                    f"{name}: is made of stages, got {type(given).__name__}. Create one with "
                    "tokenreduce.Stage(reducer=tokenreduce.create_strategy(name, reduction=16))."
                )
            stages.append(stage)
        if not stages:
            raise PipelineError(f"{name}: needs at least one stage.")
        object.__setattr__(self, "stages", tuple(stages))

    def build(self) -> BuiltPipeline:
        """Load the model, prune its vision encoder, quantize it, and attach the stages.

        The order is always this one: importance is judged on whole weights, and stages see the
        model as it will run.

        Returns:
            what was built, which unpacks to (model, processor, attachment).

        Raises:
            PipelineError: if the pipeline names no model, or the model cannot be loaded.
            BudgetError: if a stage has no budget.
            MissingExtra: if a backend needs a package that is not installed.
            UnsupportedModel: if the model has no visual tokens in its sequence.
            UnsupportedSite: if a stage cannot run at its site on this model.
            MissingSignal: if a stage needs a signal that the model cannot give.
        """
        from tokenreduce.attachment import attach, find_loader

        if self.model is None:
            raise PipelineError(
                f"{self.source or 'pipeline'} names no model. Add 'model: {{path: ...}}', or "
                "attach it to a live model with tokenreduce.attach(model, pipeline)."
            )
        for stage in self.stages:
            stage.require_budget()
        model, processor = find_loader(self.model.adapter)(self.model, self.stages)
        joint_encoder = self.model.joint_encoder
        run = attach(model, self, processor=processor, joint_encoder=joint_encoder)
        return BuiltPipeline(pipeline=self, model=model, processor=processor, attachment=run)


@dataclass(frozen=True, kw_only=True)
class BuiltPipeline:
    """A pipeline on its model. Unpacks to (model, processor, attachment).

    Attributes:
        pipeline: what was built.
        model: pruned and quantized as the pipeline says, with its stages attached.
        processor: the model's processor.
        attachment: see :class:`~tokenreduce.attachment.Attachment`.
    """

    pipeline: Pipeline
    model: Any
    processor: Any
    attachment: Any

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.processor, self.attachment))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline, the pruned and quantized weights, and the processor to a folder.

        :func:`~tokenreduce.config.load_pipeline` reads the folder, and building it again gives the
        same outputs to the bit. The original model is not needed any more.

        Raises:
            PipelineError: if the model cannot be written, or a stage cannot be named in a file.
        """
        from tokenreduce.attachment import find_saver
        from tokenreduce.config import dump_pipeline

        settings = self.pipeline.model
        if settings is None:
            raise PipelineError("this pipeline names no model, so there is nothing to save.")
        here = replace(settings, path=".", quantization=None, vision_encoder=None)
        text = dump_pipeline(replace(self.pipeline, model=here))
        find_saver(settings.adapter)(self.model, self.processor, Path(folder), settings)
        (Path(folder) / PIPELINE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BuiltPipeline:
        """Build what :meth:`save_pretrained` wrote.

        Args:
            folder: the folder, or the hub name that it was uploaded to.

        Raises:
            PipelineError: if the folder holds no pipeline, or the model cannot be loaded.
        """
        from tokenreduce.config import load_pipeline

        if Path(folder).exists() or not _HUB_NAME.fullmatch(str(folder)):
            return load_pipeline(Path(folder)).build()
        loaded = load_pipeline(_download(str(folder)))
        if loaded.model is not None:
            loaded = replace(loaded, model=replace(loaded.model, path=str(folder)))
        return loaded.build()


def _download(repository: str) -> Path:
    """The file with the pipeline in a repository of the hub, from the cache if it is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(repository, PIPELINE_FILE))
    except (OSError, EntryNotFoundError) as error:
        raise PipelineError(
            f"{repository!r}: no such folder, and no {PIPELINE_FILE} of this name on the hub or in "
            f"its cache ({type(error).__name__}). Give a folder that save_pretrained wrote, or the "
            "hub name that it was uploaded to."
        ) from error


def _backend(where: str, settings: object) -> BackendSettings:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("backend"), str):
        raise PipelineError(
            f"{where} must be a mapping that names a backend, like {{backend: NAME, ...}}, got "
            f"{settings!r}."
        )
    options = {str(key): value for key, value in settings.items() if key != "backend"}
    return BackendSettings(backend=settings["backend"], options=MappingProxyType(options))
