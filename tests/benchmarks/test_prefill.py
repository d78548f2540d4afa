"""The prefill benchmark runs and says what it promises."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/prefill.py"


def test_prefill_prints_one_json_document() -> None:
    small = ["--hidden", "128", "--layers", "2", "--rounds", "2", "--strategy", "norm-topk"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", *small],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["visual_tokens"] == [576, 36]
    assert result["keep_all_added_syncs"] == 0
    assert 0 <= result["keep_all_added_ops"] <= 4
    assert result["flops_ratio"] > 6
    for key in ("attached_over_ideal", "speedup", "device", "versions"):
        assert key in result
