"""The vLLM command that serves a pipeline, and why some pipelines have none."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from huggingface_hub.errors import HFValidationError

from tokenreduce.errors import PipelineError, ServingError, did_you_mean
from tokenreduce.pipeline import ModelSettings, Pipeline
from tokenreduce.stage import Stage
from tokenreduce.wrappers import Chain
from tokenreduce_integrations.quantization.stored import QUANTO_FILES
from tokenreduce_integrations.transformers.files import PLAN_FILE, find_file, resolve_path
from tokenreduce_integrations.vllm.families import FAMILIES, PREFIX
from tokenreduce_integrations.vllm.settings import KEY, ServedStage, refusals

#: Types of weights and activations that vLLM computes in.
_DTYPES: Final = ("float32", "bfloat16", "float16")
#: Arguments that are made of the pipeline.
_OURS: Final = ("--hf-overrides", "--model")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a pipeline, and whether vLLM can serve it.

    Attributes:
        name: its key in the file.
        what: what it says, in short.
        reason: why vLLM cannot serve it; empty if it can.
    """

    name: str
    what: str
    reason: str = ""


def parts(pipeline: Pipeline) -> tuple[Part, ...]:
    """Everything that a pipeline asks for."""
    stages = [
        Part(
            name=f"reduce[{i}]",
            what=f"{stage.reducer.name} at {stage.site}",
            reason="; ".join(refusal.reason for refusal in refusals(stage)),
        )
        for i, stage in enumerate(pipeline.stages)
    ]
    if len(stages) > 1 and not any(part.reason for part in stages):
        reason = "; ".join(refusal.reason for refusal in refusals(_one_stage(pipeline.stages)))
        stages.append(Part(name="reduce", what="all stages in a chain", reason=reason))
    if pipeline.model is None:
        return (Part(name="model", what="none", reason="say which one, as model.path"), *stages)
    return (*_model_parts(pipeline.model), *stages)


def _model_parts(model: ModelSettings) -> Iterator[Part]:
    yield Part(name="model.path", what=model.path, reason=_reason_against_files(model))
    known = model.dtype in (*_DTYPES, "auto")
    reason = "" if known else f"vLLM computes in {', '.join(_DTYPES)}"
    yield Part(name="model.dtype", what=model.dtype, reason=reason)
    quantizer, pruner = model.quantizer, model.encoder_pruner
    for key, what, reason in (
        (
            "adapter",
            "" if model.adapter == "transformers" else model.adapter,
            "vLLM has model classes of its own, and TokenReduce those of some families",
        ),
        (
            "device",
            "" if model.device == "auto" else model.device,
            "the build of vLLM says where it runs: leave it out, or add model.device=auto",
        ),
        (
            "attention",
            model.attention,
            "vLLM has attention kernels of its own: leave it out, and give --attention-backend to "
            "vLLM",
        ),
        (
            "quantization",
            quantizer and quantizer.backend,
            "vLLM joins layers that TokenReduce quantizes one by one, so weights would be others: "
            "leave it out, and give --quantization to vLLM",
        ),
        (
            "vision_encoder",
            pruner and pruner.backend,
            "vLLM builds encoders by their configuration, which knows no pruned ones",
        ),
        (
            "max_pixels",
            str(model.max_pixels or ""),
            "vLLM makes processors of its own: leave it out, and give --mm-processor-kwargs to "
            "vLLM",
        ),
        ("joint_encoder", model.joint_encoder, "vLLM loads no text encoder beside the LLM"),
    ):
        if what:
            yield Part(name=f"model.{key}", what=what, reason=reason)


def _reason_against_files(model: ModelSettings) -> str:
    try:
        checkpoint = Checkpoint.of(model)
        architecture = checkpoint.architecture
    except PipelineError as error:
        return str(error).rstrip(".")
    if PREFIX + architecture not in FAMILIES:
        families = [family.architecture for family in FAMILIES.values()]
        hint = did_you_mean(architecture, families).rstrip(".")
        return f"{architecture} is of no family that is served. {hint}"
    if find_file(checkpoint.path, PLAN_FILE) is not None:
        return "its vision encoder was pruned before it was saved, and vLLM loads whole ones"
    if any(find_file(checkpoint.path, name) is not None for name in QUANTO_FILES):
        return "its weights were quantized by quanto, which vLLM does not read"
    return ""


@dataclass(frozen=True)
class Checkpoint:
    """A model as it is stored.

    Attributes:
        path: its folder or hub name.
        config: what its ``config.json`` says.
    """

    path: str
    config: dict[str, Any]

    @classmethod
    def of(cls, model: ModelSettings) -> Checkpoint:
        """The model that a pipeline names.

        Raises:
            PipelineError: if it has no configuration.
        """
        path = resolve_path(model.path)
        try:
            file = find_file(path, "config.json")
            config = None if file is None else json.loads(file.read_text(encoding="utf-8"))
        except HFValidationError:
            # Neither a folder nor a name that the hub could have.
            config = None
        except (OSError, ValueError) as error:
            raise PipelineError(f"config.json of {path!r} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise PipelineError(
                f"there is no config.json in {path!r}. Give a folder that save_pretrained wrote, "
                "or the name of a model on the hub or in its cache."
            )
        return cls(path, config)

    @cached_property
    def architecture(self) -> str:
        """The name of the model's class.

        Raises:
            PipelineError: if the configuration names none.
        """
        named = self.config.get("architectures")
        if not isinstance(named, list) or not named:
            raise PipelineError(f"config.json of {self.path!r} names no architecture.")
        return str(named[0])

    @property
    def dtype(self) -> str:
        """The type of the weights; ``auto`` if the configuration does not say."""
        for part in (self.config, self.config.get("text_config") or {}):
            for key in ("dtype", "torch_dtype"):
                if part.get(key) in _DTYPES:
                    return str(part[key])
        return "auto"

    def require(self, served: ServedStage) -> None:
        """Check that the model gives what a stage needs.

        Raises:
            ServingError: if it does not.
        """
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
        except (OSError, ValueError):
            # A configuration that comes with the model or with vLLM: that checks it at its start.
            return
        FAMILIES[PREFIX + self.architecture].require(served, config)


def _one_stage(stages: Sequence[Stage]) -> Stage:
    """Stages one after another, each with its budget of what the one before left."""
    if len(stages) == 1:
        return stages[0]
    return Stage(reducer=Chain(reducers=tuple(stage.reducer for stage in stages)))


@dataclass(frozen=True, kw_only=True)
class Server:
    """What vLLM is to serve.

    Attributes:
        model: of the pipeline.
        checkpoint: its files.
        stage: what is reduced; several stages run as one chain.
    """

    model: ModelSettings
    checkpoint: Checkpoint
    stage: ServedStage

    @classmethod
    def of(cls, pipeline: Pipeline, query: str | None = None) -> Server:
        """The server for a pipeline.

        Args:
            pipeline: with a model.
            query: what prompt-aware strategies compare with where a request says nothing.

        Raises:
            ServingError: if some part cannot be served; :func:`parts` tells which.
            TokenReduceError: if a file of weights that a strategy needs cannot be read.
        """
        refused = [part for part in parts(pipeline) if part.reason]
        if refused or pipeline.model is None:
            listed = " ".join(f"{part.name} ({part.what}): {part.reason}." for part in refused)
            raise ServingError(f"vLLM cannot serve {pipeline.source or 'this pipeline'}. {listed}")
        config = ServedStage(stage=_one_stage(pipeline.stages)).to_config()
        stage = ServedStage.from_config(config if query is None else {**config, "query": query})
        checkpoint = Checkpoint.of(pipeline.model)
        checkpoint.require(stage)
        return cls(model=pipeline.model, checkpoint=checkpoint, stage=stage)

    def command(
        self, extra: Sequence[str] = (), *, trust_requests: bool = False, build: str = "vllm"
    ) -> list[str]:
        """The command of vLLM.

        Args:
            extra: further arguments of vLLM.
            trust_requests: whether requests may change what is reduced.
            build: the distribution of vLLM. That for CPUs has no command of its own.

        Raises:
            ServingError: if ``extra`` would undo the reduction, or no request could be served.
        """
        for argument in extra:
            name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
            if name in _OURS:
                raise ServingError(
                    f"{argument}: is made of the pipeline, and a second one would undo the "
                    "reduction. Change the pipeline, as in 'tokenreduce serve FILE "
                    "reduce.0.reduction=8'."
                )
        if self.stage.needs_query and self.stage.query is None and not trust_requests:
            raise ServingError(
                f"{self.stage.reducer().name} compares pictures with a text: give --query, or let "
                "requests give it with --trust-requests."
            )
        path = self.checkpoint.path
        if build == "vllm":
            return ["vllm", "serve", path, *self._arguments(trust_requests), *extra]
        module = "vllm.entrypoints.openai.api_server"
        start = [sys.executable, "-m", module, "--model", path]
        return [*start, *self._arguments(trust_requests), *extra]

    def _arguments(self, trust_requests: bool) -> list[str]:
        architecture = PREFIX + self.checkpoint.architecture
        overrides = {"architectures": [architecture], KEY: self.stage.to_config()}
        # Left to itself, vLLM halves float32, and reads pickled weights where there are no others.
        dtype = self.checkpoint.dtype if self.model.dtype == "auto" else self.model.dtype
        made = ["--dtype", dtype, "--hf-overrides", json.dumps(overrides)]
        if not self.model.allow_pickle:
            made += ["--load-format", "safetensors"]
        return [*made, "--trust-request-mm-kwargs"] if trust_requests else made


def program(first: str) -> Path:
    """The program that a command begins with, that of this environment before any other.

    Raises:
        ServingError: if there is none, or the environment keeps vLLM from loading TokenReduce.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and KEY not in allowed.split(","):
        raise ServingError(
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading TokenReduce. Add {KEY!r} to it."
        )
    beside = str(Path(sys.executable).parent)
    found = shutil.which(first, path=os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise ServingError(f"there is no program {first!r} beside {sys.executable} or on the PATH.")
    return Path(found)
