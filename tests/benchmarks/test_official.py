"""The comparison with official timings runs and prints the rows that it promises."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/official.py"


def test_official_prints_one_json_document() -> None:
    quick = ["--only", "divprune", "fastervlm", "evs", "--tokens", "576", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--threads", "1", *quick],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["device"].endswith("1 thread, float32")
    assert [row["strategy"] for row in result["rows"]] == ["divprune", "fastervlm"]
    for row in result["rows"]:
        assert (row["n"], row["k"]) == (576, 72)
        assert row["grams"] > 0
        assert row["official_grams"] == {"divprune": 2.53, "fastervlm": 0.032}[row["strategy"]]
    assert done.stderr.count(" official ") == 2
