"""The serving benchmark runs and says what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/serving.py"


@pytest.mark.vllm
def test_serving_prints_one_json_document() -> None:
    small = "--rounds 1 --requests 2 --clients 2 --frames 4 --side 6 --hidden 256 --layers 1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *small.split(), "--strategies", "uniform"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["visual_tokens"] == 72
    rows = {row["server"]: row for row in result["servers"]}
    assert list(rows) == ["unreduced", "vllm-evs", "uniform"]
    lengths = {name: row["prompt_tokens"] for name, row in rows.items()}
    # vLLM's rule keeps the first frame at least.
    assert lengths["unreduced"] - lengths["vllm-evs"] == 72 - 36
    assert lengths["unreduced"] - lengths["uniform"] == 72 - 18
    assert all(row["per_second"] > 0 and row["first_token_ms"] > 0 for row in rows.values())
