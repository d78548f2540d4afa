"""The benchmarks of long clips run and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, *options: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


def test_long_video_prints_one_json_document() -> None:
    options = ["--n", "8192", "--channels", "64", "--backends", "torch", "--rivals", "uniform"]
    result = run("long_video.py", *options, "fastvid")
    rows = {(row["strategy"], row["mode"], row["backend"]): row for row in result["rows"]}
    for key in ("n", "kept", "seconds", "extra_bytes", "feature_bytes", "overlap_with_exact"):
        assert all(key in row or "refused" in row for row in rows.values())
    assert rows["lftr", "batch", "torch"]["overlap_with_exact"] == 1
    assert rows["lftr", "stream", "auto"]["kept"] == 512
    assert rows["uniform", "batch", "-"]["kept"] == 512
    assert "class_attention" in rows["fastvid", "batch", "-"]["refused"]


def test_neighbors_prints_one_json_document() -> None:
    options = ["--n", "256", "512", "--channels", "32", "--backends", "torch"]
    result = run("neighbors.py", *options)
    assert [row["recall"] for row in result["rows"]] == [1, 1]
