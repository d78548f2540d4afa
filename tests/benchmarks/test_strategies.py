"""The benchmark of the strategies runs and prints the rows that it promises."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/strategies.py"


def test_strategies_prints_one_json_document() -> None:
    quick = ["--only", "fastv", "divprune", "--n", "576", "--batch", "1", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *quick],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    result = json.loads(done.stdout)
    assert {"device", "torch", "tokenreduce"} <= set(result)
    assert [row["strategy"] for row in result["rows"]] == ["fastv", "divprune"]
    for row in result["rows"]:
        assert (row["n"], row["d"], row["k"], row["batch"]) == (576, 1024, 72, 1)
        assert row["gram_ms"] > 0
        assert row["read_ms"] > 0
        assert row["ms"] > 0
    assert done.stderr.count(" Gram ") == 2
