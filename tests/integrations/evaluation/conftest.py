from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tokenreduce as tr
from tokenreduce_integrations.evaluation.data import Questions, load_questions
from tokenreduce_integrations.testbed.models import load


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_and_processor() -> tuple[Any, Any]:
    return load("b")


@pytest.fixture(scope="session")
def questions() -> Questions:
    return load_questions("testbed,seed=9,scenes=6")


def pipeline(*stages: dict[str, Any]) -> tr.Pipeline:
    """A pipeline on the testbed model."""
    model = {"path": "testbed:b", "dtype": "float32", "device": "cpu"}
    return tr.load_pipeline({"model": model, "reduce": list(stages)})
