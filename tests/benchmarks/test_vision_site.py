"""The benchmark of merging inside an encoder runs and says what it promises."""

import argparse
import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/vision_site.py"


def test_vision_site_times_the_same_tokens_per_block() -> None:
    spec = importlib.util.spec_from_file_location("vision_site", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    options = argparse.Namespace(
        model="vit_tiny_patch16_224",
        strategy="tome",
        r=8,
        batch=1,
        rounds=2,
        warmup=0,
        threads=1,
        device="cpu",
        dtype="float32",
    )
    result = benchmark.run(options)
    assert result["tokens_per_block"] == [197 - 8 * block for block in range(12)]
    assert result["matching_ms"] > 0
    for key in ("attached_over_ideal", "speedup", "device", "versions"):
        assert key in result
