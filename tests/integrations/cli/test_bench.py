"""``tokenreduce bench``."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import PIPELINE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)
    return path


def test_a_table(tokenreduce: Callable[..., Any], file: Path) -> None:
    result = tokenreduce("bench", file, "--rounds", 1, "--new-tokens", 2)
    assert result.exit_code == 0, result.output
    for heading in ("weights, MiB", "GFLOPs, selection", "prefill ms, batch 1", "KV cache"):
        assert heading in result.output


def test_json_and_a_picture(tokenreduce: Callable[..., Any], file: Path, picture: Path) -> None:
    result = tokenreduce(
        "bench", file, "--media", picture, "--json", "--batch-size", 1, "--batch-size", 2,
        "--rounds", 1, "--new-tokens", 2,
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert set(document["speedup"]) == {"1", "2"}
    assert document["pipeline"]["layer_average"] == 18


def test_from_the_configuration_alone(tokenreduce: Callable[..., Any], file: Path) -> None:
    result = tokenreduce("bench", file, "--config-only", "--json", "--text-tokens", 10)
    document = json.loads(result.stdout)
    assert document["baseline"]["visual_tokens"] == 144
    assert document["pipeline"]["layer_average"] == 18
    table = tokenreduce("bench", file, "--config-only")
    assert "prefill GFLOPs" in table.output


def test_a_pruned_encoder_from_its_configuration(
    tokenreduce: Callable[..., Any], file: Path
) -> None:
    pruned = "model.vision_encoder.prune={backend: structured, mlp_ratio: 0.3}"
    result = tokenreduce("bench", file, pruned, "--config-only", "--json")
    document = json.loads(result.stdout)
    assert document["pipeline"]["encoder_flops"] < document["baseline"]["encoder_flops"]
    assert document["pipeline"]["parameters"] < document["baseline"]["parameters"]


def test_a_model_that_is_not_there(tokenreduce: Callable[..., Any], file: Path) -> None:
    result = tokenreduce("bench", file, "model.path=/no/such", "--config-only")
    assert result.exit_code == 1
    assert "no such folder" in " ".join(result.output.split())
