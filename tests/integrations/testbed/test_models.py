"""The shipped models load offline, stay small, and state what they have learned."""

import pytest
import torch

from tokenreduce_integrations.testbed.models import (
    MODEL_NAMES,
    card,
    load,
    model_path,
    reported_types,
)
from tokenreduce_integrations.testbed.scenes import QUESTION_TYPES


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no testbed model"):
        model_path("c")


def test_models_stay_small() -> None:
    files = [file for name in MODEL_NAMES for file in model_path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 8e6


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_models_load_in_the_wanted_precision(name: str) -> None:
    model, processor = load(name, torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_reported_types_are_learned_well_above_the_majority_answer(name: str) -> None:
    by_type = card(name)["evaluation"]["by_type"]
    assert set(by_type) == set(QUESTION_TYPES)
    assert reported_types(name)
    for kind in reported_types(name):
        assert by_type[kind]["accuracy"] >= by_type[kind]["majority"] + 0.15
