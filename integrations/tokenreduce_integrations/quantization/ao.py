"""torchao: int8, intx and float8."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torchao.quantization as ao
from torch import nn
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import TorchAoConfig

from tokenreduce.errors import PipelineError
from tokenreduce_integrations.options import refuse_unknown, whole
from tokenreduce_integrations.quantization.choices import (
    WHERE,
    modules_to_skip,
    quantized_linears,
    scheme_on,
)

_DEVICES = dict.fromkeys(
    ("int8_weight_only", "int8_dynamic", "intx_weight_only", "float8_weight_only"), ("cpu", "cuda")
)
_PLAIN = {
    "int8_weight_only": ao.Int8WeightOnlyConfig,
    "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
    "float8_weight_only": ao.Float8WeightOnlyConfig,
}


class TorchAO:
    """Weights as torchao's tensors.

    Options:
        scheme: ``int8_weight_only``, ``int8_dynamic`` (activations too, token by token),
            ``intx_weight_only``, or ``float8_weight_only``.
        modules: see :func:`~tokenreduce_integrations.quantization.choices.quantized_linears`.
        bits: of ``intx_weight_only``, 1 to 8; 4 if omitted.
        group_size: of ``intx_weight_only``, how many inputs share a scale; all if omitted.
    """

    known = ("scheme", "modules", "bits", "group_size")

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        """See :class:`tokenreduce.backends.Quantizer`."""
        refuse_unknown(options, self.known, WHERE)
        scheme = scheme_on("torchao", options, _DEVICES, device)
        quantized = quantized_linears(model, options)
        if scheme == "intx_weight_only":
            config: Any = _intx(options, quantized)
        else:
            for name in ("bits", "group_size"):
                if name in options:
                    raise PipelineError(f"{WHERE}.{name}: belongs to the scheme intx_weight_only.")
            config = _PLAIN[scheme]()
        skipped = modules_to_skip(model, quantized)
        return {"quantization_config": TorchAoConfig(config, modules_to_not_convert=skipped)}


@contextmanager
def readable_names(model: Any) -> Iterator[None]:
    """Save a model so that it can be read again, for as long as the context is open.

    torchao lists every tensor of the file, and cannot read a list with a name that belongs to no
    module, such as the queries of a Q-Former. Plain tensors are read without being listed.
    """
    quantizer = model.hf_quantizer
    flatten = quantizer.get_state_dict_and_metadata

    def listed(saved: Any) -> tuple[dict[str, Any], dict[str, str]]:
        state, metadata = flatten(saved)
        names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
        metadata["tensor_names"] = json.dumps(names)
        return state, metadata

    quantizer.get_state_dict_and_metadata = listed
    try:
        yield
    finally:
        del quantizer.get_state_dict_and_metadata


def _intx(options: Mapping[str, Any], quantized: Mapping[str, nn.Linear]) -> Any:
    bits = options.get("bits", 4)
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise PipelineError(f"{WHERE}.bits: a whole number from 1 to 8, got {bits!r}.")
    if options.get("group_size") is None:
        granularity: Any = PerAxis(0)
    else:
        group = whole(options, "group_size", 1, WHERE)
        for name, linear in quantized.items():
            if linear.in_features % group:
                raise PipelineError(
                    f"{WHERE}.group_size: {name} reads {linear.in_features} channels, which groups "
                    f"of {group} do not divide. Take a divisor, or leave group_size out."
                )
        granularity = PerGroup(group)
    weight_dtype = getattr(torch, f"int{bits}")
    return ao.IntxWeightOnlyConfig(weight_dtype=weight_dtype, granularity=granularity)
