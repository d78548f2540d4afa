"""bitsandbytes: int8, nf4 and fp4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from bitsandbytes import functional
from torch import nn
from transformers import BitsAndBytesConfig

from tokenreduce.errors import PipelineError
from tokenreduce_integrations.options import refuse_unknown
from tokenreduce_integrations.quantization.choices import (
    WHERE,
    modules_to_skip,
    quantized_linears,
    scheme_on,
)

_DEVICES = dict.fromkeys(("int8", "nf4", "fp4"), ("cpu", "cuda"))
#: How wide the tiles are into which 4-bit weights are packed for CPUs with AVX512-BF16.
_CPU_INPUTS, _CPU_OUTPUTS = 64, 32


class BitsAndBytes:
    """Linear layers of bitsandbytes.

    Options:
        scheme: ``int8`` (LLM.int8), ``nf4`` or ``fp4``.
        modules: see :func:`~tokenreduce_integrations.quantization.choices.quantized_linears`.
        compute_dtype: of ``nf4`` and ``fp4``, the type to compute in; float32 if omitted.
    """

    known = ("scheme", "modules", "compute_dtype")

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        """See :class:`tokenreduce.backends.Quantizer`."""
        refuse_unknown(options, self.known, WHERE)
        scheme = scheme_on("bitsandbytes", options, _DEVICES, device)
        quantized = quantized_linears(model, options)
        common = {"llm_int8_skip_modules": modules_to_skip(model, quantized)}
        if scheme == "int8":
            if "compute_dtype" in options:
                raise PipelineError(f"{WHERE}.compute_dtype: belongs to the schemes nf4 and fp4.")
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **common)}
        name = options.get("compute_dtype", "float32")
        compute = getattr(torch, name, None) if isinstance(name, str) else None
        if not isinstance(compute, torch.dtype) or not compute.is_floating_point:
            raise PipelineError(f"{WHERE}.compute_dtype: {name!r} is no floating point type.")
        if device.type == "cpu" and functional.has_avx512bf16():
            _require_tiles(scheme, quantized)
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=scheme,
            bnb_4bit_compute_dtype=compute,
            **common,
        )
        return {"quantization_config": config}


def unpack(model: nn.Module) -> None:
    """Undo the packing of 4-bit weights for the CPU, which a model's first call does.

    bitsandbytes unpacks weights when they are saved but leaves their scales transposed, so that
    both the file and the model would be wrong. The next call packs them again.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        state: Any = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not state.original_nested:
            scales = state.absmax
            weight.data, state = functional._convert_weight_packed_for_cpu_inverse(
                weight.data, state
            )
            state.absmax = scales.T.reshape(-1).float()


def _require_tiles(scheme: str, quantized: Mapping[str, nn.Linear]) -> None:
    for name, linear in quantized.items():
        if linear.in_features % _CPU_INPUTS or linear.out_features % _CPU_OUTPUTS:
            raise PipelineError(
                f"{WHERE}.scheme: {scheme!r} of 'bitsandbytes' cannot pack {name} "
                f"({linear.in_features} -> {linear.out_features}) on this CPU: inputs must be a "
                f"multiple of {_CPU_INPUTS}, outputs of {_CPU_OUTPUTS}. Leave its part out of "
                f"modules, prune with multiple_of: {_CPU_INPUTS}, or take scheme int8."
            )
