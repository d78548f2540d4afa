"""Parameters of a model and the bytes that they take, quantized or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tokenreduce_integrations.accounting.parts import PARTS, modules_by_part

OTHER = "other"


@dataclass(frozen=True)
class Weights:
    """Parameters and bytes by part; tied weights count once, where they come first."""

    parameters: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(self.bytes.values())


def weigh(model: nn.Module) -> Weights:
    """Parameters and bytes of a model.

    A parameter is a number of the model as it was trained: packed weights count what they stand
    for, scales and zero points count as bytes alone.
    """
    owners = _owners(model)
    parameters, sizes = dict.fromkeys((*PARTS, OTHER), 0), dict.fromkeys((*PARTS, OTHER), 0)
    seen: set[int] = set()
    for name, module in model.named_modules():
        part = _part(name, owners)
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters[part] += _count(parameter)
                sizes[part] += sum(_bytes(tensor) for tensor in _stored(parameter))
        sizes[part] += sum(_bytes(scales) for scales in _int8_scales(module))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                sizes[part] += _bytes(buffer)
    return Weights(
        parameters={part: n for part, n in parameters.items() if n},
        bytes={part: n for part, n in sizes.items() if n},
    )


def _owners(model: nn.Module) -> dict[str, str]:
    parts = modules_by_part(model)
    return {name: parts[module][0] for name, module in model.named_modules() if module in parts}


def _part(name: str, owners: dict[str, str]) -> str:
    """The part of the nearest module that has one."""
    steps = name.split(".")
    prefixes = (".".join(steps[:n]) for n in range(len(steps), 0, -1))
    return next((owners[prefix] for prefix in prefixes if prefix in owners), OTHER)


def _count(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    # Two 4-bit numbers of bitsandbytes share a byte.
    return math.prod(state.shape) if state is not None else int(parameter.numel())


def _stored(parameter: Any) -> Iterator[Tensor]:
    """The plain tensors that a parameter is made of."""
    if hasattr(parameter, "__tensor_flatten__"):
        for name in parameter.__tensor_flatten__()[0]:
            yield from _stored(getattr(parameter, name))
        return
    yield parameter
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield state.absmax
        yield state.code


def _int8_scales(module: Any) -> list[Tensor]:
    """Scales of bitsandbytes' int8, which its first call moves from the weights to the layer."""
    holders = (getattr(module, "weight", None), getattr(module, "state", None))
    scales = [getattr(holder, "SCB", None) for holder in holders]
    return [found for found in scales if isinstance(found, Tensor)][:1]


def _bytes(tensor: Tensor) -> int:
    return int(tensor.numel()) * tensor.element_size()
