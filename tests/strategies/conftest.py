"""Loading recorded cases of official code, which live in ``tests/data/parity``."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parents[1] / "data" / "parity"


class ParityCase(NamedTuple):
    """Inputs, the outputs that the official code gave for them, and its parameters."""

    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    parameters: dict[str, Any]

    def check(self, **got: Tensor) -> None:
        """Integers exactly; floats within 1e-3, and 1e-4 of the largest magnitude."""
        for name, value in got.items():
            wanted = self.expected[name]
            assert value.shape == wanted.shape, name
            if wanted.is_floating_point():
                atol = 1e-4 * max(1.0, float(wanted.abs().max()) if wanted.numel() else 1.0)
                torch.testing.assert_close(value, wanted, rtol=1e-3, atol=atol, msg=name)
            else:
                assert torch.equal(value, wanted), name


@pytest.fixture
def parity_case():
    """A function from ``"method/case"`` to the recorded case; a missing file is an error."""

    def load(name: str) -> ParityCase:
        sides: dict[str, dict[str, Tensor]] = {"in": {}, "out": {}}
        with safe_open(ROOT / f"{name}.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118
                side, _, tensor = key.partition(".")
                sides[side][tensor] = file.get_tensor(key)
            parameters = json.loads(file.metadata()["parameters"])
        return ParityCase(sides["in"], sides["out"], parameters)

    return load
