"""The commands ``eval`` and ``compare``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokenreduce_integrations.evaluation.schema import read_comparison, read_header, read_rows

DATA = "testbed,seed=3,scenes=2"


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def test_eval_writes_a_row_a_question(tokenreduce: Callable[..., Any], pipeline: Path) -> None:
    options = ("--data", DATA, "--out", "rows.jsonl")
    result = tokenreduce("eval", pipeline, *options, "--json")
    found = json.loads(result.stdout)
    rows = list(read_rows("rows.jsonl"))
    assert found["samples"] == len(rows) == read_header("rows.jsonl").samples
    assert found["tokens"]["tokens_out"] == 18
    assert found["micro"]["value"] == sum(row.correct for row in rows) / len(rows)
    again = tokenreduce("eval", pipeline, *options)
    assert "144.0 -> 18.0" in again.output
    other = tokenreduce(
        "eval", pipeline, "reduce.0.reduction=4", "--data", DATA, "--out", "rows.jsonl"
    )
    assert other.exit_code == 1
    assert "begun with another pipeline" in " ".join(other.output.split())


def test_eval_fails_where_nothing_is_reduced(
    tokenreduce: Callable[..., Any], pipeline: Path
) -> None:
    lazy = ("eval", pipeline, "reduce.0.reduction=1", "--data", DATA, "--limit", 3)
    result = tokenreduce(*lazy)
    assert result.exit_code == 1
    assert "reduced none of the 3 samples" in " ".join(result.output.split())
    whole = tokenreduce(*lazy, "--no-reduction", "--out", "whole.jsonl", "--json")
    assert json.loads(whole.stdout)["tokens"]["tokens_out"] == 144


def test_compare_prints_controls_and_refusals(
    tokenreduce: Callable[..., Any], pipeline: Path, tmp_path: Path
) -> None:
    sweep = pipeline.read_text() + "sweep: {reduce.0.strategy: [lftr, trim]}\n"
    (tmp_path / "sweep.yaml").write_text(sweep)
    result = tokenreduce(
        "compare", "sweep.yaml", "model.dtype=float32", "--data", DATA, "--out", "out",
        "--cost-rounds", 0,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for text in ("unreduced", "lftr reduction=8", "avg-pool reduction=8", "cannot run", "joint"):
        assert text in result.output
    found = read_comparison("out")
    assert {run.name for run in found.runs if run.role == "control"} == {
        f"{name} reduction=8" for name in ("random", "uniform", "avg-pool")
    }
    document = tokenreduce(
        "compare", "sweep.yaml", "--data", DATA, "--out", "out", "--cost-rounds", 0, "--json"
    )
    assert json.loads(document.stdout) == json.loads(Path("out/comparison.json").read_text())


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tokenreduce_integrations.cli", *map(str, arguments)]


@pytest.mark.slow
def test_a_killed_command_continues(pipeline: Path, tmp_path: Path) -> None:
    def evaluation(out: str) -> list[str]:
        options = ("--data", "testbed,seed=3,scenes=12", "--batch-size", 4, "--out", tmp_path / out)
        return command("eval", pipeline, *options)

    began = time.perf_counter()
    subprocess.run(evaluation("straight.jsonl"), check=True, capture_output=True)
    took = time.perf_counter() - began
    for share in range(10):
        with subprocess.Popen(evaluation("killed.jsonl"), stderr=subprocess.DEVNULL) as process:
            time.sleep(took * (0.3 + 0.06 * share))
            os.kill(process.pid, signal.SIGKILL)
    subprocess.run(evaluation("killed.jsonl"), check=True, capture_output=True)
    assert without_times(tmp_path / "killed.jsonl") == without_times(tmp_path / "straight.jsonl")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(pipeline: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(pipeline.read_text() + "sweep: {reduce.0.strategy: [lftr, random, evs]}\n")
    for processes in (1, 2):
        options = ("--data", "testbed,seed=3,scenes=6", "--batch-size", 8, "--cost-rounds", 0)
        out = tmp_path / str(processes)
        subprocess.run(
            command("compare", sweep, *options, "--out", out, "--processes", processes),
            check=True,
            capture_output=True,
        )
    one, two = (tmp_path / name for name in "12")
    names = sorted(file.name for file in (one / "runs").iterdir())
    assert names == sorted(file.name for file in (two / "runs").iterdir())
    for name in names:
        assert without_times(one / "runs" / name) == without_times(two / "runs" / name)
    first, second = (json.loads((folder / "comparison.json").read_text()) for folder in (one, two))
    assert {**first, "device": ""} == {**second, "device": ""}
