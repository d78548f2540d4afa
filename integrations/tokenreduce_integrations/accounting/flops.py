"""Counting FLOPs part by part, of what runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenreduce.errors import UncountedOperator
from tokenreduce_integrations.accounting.operators import formulas, is_costly
from tokenreduce_integrations.accounting.parts import (
    LLM,
    PARTS,
    SELECTION,
    Part,
    listening,
    modules_by_part,
)


@dataclass(frozen=True)
class Flops:
    """FLOPs by part, and of the LLM also by layer.

    Attributes:
        parts: FLOPs of each of :data:`~tokenreduce_integrations.accounting.parts.PARTS`.
        layers: FLOPs of each layer of the LLM, which the part ``llm`` includes.
    """

    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    layers: dict[int, int] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """FLOPs of everything."""
        return sum(self.parts.values())


class _PartCounter(FlopCounterMode):
    """Counts into the part that runs; what runs outside of all is the choice of tokens."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=formulas())
        self.flops = Flops()
        self._running: list[tuple[str, int | None]] = []

    def enter(self, part: str, layer: int | None) -> None:
        self._running.append((part, layer))

    def leave(self) -> None:
        self._running.pop()

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        formula = self.flop_registry.get(func_packet)
        if formula is not None:
            part = self._running[-1][0] if self._running else SELECTION
            count = int(formula(*args, **kwargs, out_val=out))
            self.flops.parts[part] += count
            numbers = [number for _, number in self._running if number is not None]
            if part == LLM and numbers:
                self.flops.layers[numbers[-1]] += count
        elif is_costly(func_packet):
            raise UncountedOperator(
                f"operator {func_packet} has no FLOP formula, so that the count would be wrong. "
                "Add one to tokenreduce_integrations.accounting.operators, or measure time alone."
            )
        return out


@torch.no_grad()
def count_flops(
    model: nn.Module, call: Callable[[], Any], parts: Mapping[nn.Module, Part] | None = None
) -> Flops:
    """FLOPs of a call of a model, of what really ran.

    Args:
        model: a multimodal model.
        call: runs it.
        parts: its parts, if they are known.

    Raises:
        UncountedOperator: if an operator ran that does products and has no formula.
    """
    counter = _PartCounter()
    with counter, listening(modules_by_part(model) if parts is None else parts, counter):
        call()
    return counter.flops
