"""Counting what a call does, operator by operator: the same figures on every machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):
    """Counts while it is open.

    Attributes:
        operators: how many were called.
        largest: numbers in the largest tensor that one of them returned.
    """

    operators = 0
    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self.operators += 1
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return made


def metered(call: Callable[[], object]) -> Meter:
    """What a call does."""
    untyped: Any = Meter
    meter: Meter = untyped()
    with meter:
        call()
    return meter
