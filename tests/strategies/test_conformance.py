"""Every registered strategy keeps the contract."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tokenreduce import create_strategy
from tokenreduce.plugins import installed
from tokenreduce.testing import parametrize_checks
from tokenreduce.testing.subject import CHANNELS

FOLDER = tempfile.TemporaryDirectory(prefix="tokenreduce-weights-")


def trained(name, **tensors):
    """The strategy with weights of some kind, as a function of the budget."""
    path = Path(FOLDER.name) / f"{name}.safetensors"
    save_file(tensors, path)
    return lambda **budget: create_strategy(name, weights=str(path), **budget)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@parametrize_checks(
    *(record.name for record in installed().strategies.values() if not record.needs_weights),
    trained(
        "token-grouping",
        **{
            "semantic_tokens": draw(40, 6),
            "query.weight": draw(8, 6),
            "key.weight": draw(8, CHANNELS),
        },
    ),
    # A router of zeros keeps all tokens; what an exit does is what vtw does.
    trained(
        "dyvte",
        **{"fc1.weight": torch.zeros(4, 2 * CHANNELS), "fc2.weight": torch.zeros(2, 4)},
    ),
)
def test_conformance(check):
    check()


@parametrize_checks(
    trained("space-to-depth", weight=draw(CHANNELS, 4 * CHANNELS), bias=draw(CHANNELS)),
    expected_failures={"features": "a projection mixes channels, which weights of tokens cannot"},
)
def test_projections(check):
    check()
