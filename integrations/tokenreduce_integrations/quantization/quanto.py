"""optimum-quanto: int8, int4 and float8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from optimum.quanto import quantization_map, requantize
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import QuantoConfig

from tokenreduce.errors import PipelineError
from tokenreduce_integrations.options import refuse_unknown
from tokenreduce_integrations.quantization.choices import (
    WHERE,
    modules_to_skip,
    quantized_linears,
    scheme_on,
)
from tokenreduce_integrations.quantization.stored import QUANTO_MAP, QUANTO_WEIGHTS

_DEVICES = dict.fromkeys(("int8", "int4", "float8"), ("cpu", "cuda"))
_COMPILERS = ("c++", "g++", "clang++")


class Quanto:
    """Linear layers of quanto.

    Options:
        scheme: ``int8``, ``int4`` or ``float8`` weights. ``int4`` compiles an extension at first
            use, which takes minutes.
        modules: see :func:`~tokenreduce_integrations.quantization.choices.quantized_linears`.
    """

    known = ("scheme", "modules")

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        """See :class:`tokenreduce.backends.Quantizer`."""
        refuse_unknown(options, self.known, WHERE)
        scheme = scheme_on("quanto", options, _DEVICES, device)
        if scheme == "int4":
            _require_compiler()
        skipped = modules_to_skip(model, quantized_linears(model, options))
        config = QuantoConfig(weights=scheme, modules_to_not_convert=skipped)
        return {"quantization_config": config}


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights of a quantized model, which transformers does not do."""
    # Tied weights share memory, which the format does not allow.
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / QUANTO_WEIGHTS, metadata={"format": "pt"})
    (folder / QUANTO_MAP).write_text(json.dumps(quantization_map(model)), encoding="utf-8")


def load_weights(model: nn.Module, folder: Path, device: torch.device) -> None:
    """Quantize a model whose weights do not count, and fill it with what was written."""
    mapping = json.loads((folder / QUANTO_MAP).read_text(encoding="utf-8"))
    requantize(model, load_file(folder / QUANTO_WEIGHTS), mapping, device)


def _require_compiler() -> None:
    missing = []
    if shutil.which("ninja") is None:
        missing.append("ninja (pip install ninja; it has to be on the PATH)")
    if not any(shutil.which(name) for name in _COMPILERS):
        missing.append("a C++ compiler")
    if missing:
        raise PipelineError(
            f"{WHERE}.scheme: 'int4' of 'quanto' compiles an extension at first use and lacks "
            f"{' and '.join(missing)}. Without one: int8, float8, or torchao's intx_weight_only."
        )
