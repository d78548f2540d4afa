"""Settings of the whole process, which no plugin has business with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def settings() -> dict[str, Any]:
    """The settings as they are now, by name."""
    return {
        "gradients": torch.is_grad_enabled(),
        "default type": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
        "warning filters": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
    }


@contextmanager
def restored() -> Iterator[None]:
    """Put back what changes while the context is open, so that one check does not spoil another."""
    before = settings()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        torch.set_grad_enabled(before["gradients"])
        torch.set_default_dtype(before["default type"])
        torch.use_deterministic_algorithms(before["deterministic algorithms"])
        torch.set_float32_matmul_precision(before["precision of products"])
        if torch.get_num_threads() != before["threads"]:
            torch.set_num_threads(before["threads"])
        for name in os.environ.keys() - before["environment"].keys():
            del os.environ[name]
        os.environ.update(before["environment"])
        os.chdir(before["folder"])
