"""A comparison of the testbed model, made once a session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tokenreduce_integrations.evaluation import comparing
from tokenreduce_integrations.evaluation.data import load_questions
from tokenreduce_integrations.evaluation.planning import load_plan
from tokenreduce_integrations.evaluation.schema import Comparison, read_comparison

SWEEP = """
model: {path: "testbed:b", dtype: float32, device: cpu}
reduce:
  - {strategy: lftr, site: projector, reduction: 8}
sweep:
  reduce.0.strategy: [lftr, norm-topk, trim]
  reduce.0.reduction: [4, 16]
"""
DECODER = """
model: {path: "testbed:b", dtype: float32, device: cpu}
reduce:
  - {strategy: fastv, site: decoder, layer: 2, reduction: 16}
"""


@functools.cache
def testbed() -> Comparison:
    """Strategies before and inside the LLM, controls, and one that cannot run."""
    folder = Path(tempfile.mkdtemp(prefix="tokenreduce-comparison-"))
    files = []
    for name, text in (("sweep", SWEEP), ("fastv", DECODER)):
        files.append(str(folder / f"{name}.yaml"))
        Path(files[-1]).write_text(text)
    plan = load_plan(files)
    options = comparing.Options(cost_rounds=1)
    comparing.compare(plan, load_questions("testbed,scenes=12"), folder / "out", options)
    return read_comparison(folder / "out")
