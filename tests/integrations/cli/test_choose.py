"""The command ``choose``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def test_choose_prints_both_tables(tokenreduce: Callable[..., Any]) -> None:
    result = tokenreduce("choose", "--model", "testbed:b", "--budget", "keep=18")
    assert result.exit_code == 0, result.output
    able, _, unable = result.output.partition("cannot run")
    assert "visionzip" in able
    assert "cdpruner" in unable
    assert "evidence 1: testbed:" in result.output
    listed = json.loads(tokenreduce("choose", "--model", "testbed:b", "--json").stdout)
    assert listed[0]["evidence"]
    for budget in ("keep=many", "tokens=3", "8"):
        wrong = tokenreduce("choose", "--model", "testbed:b", "--budget", budget)
        assert wrong.exit_code == 1
        assert "write keep=64" in wrong.output
