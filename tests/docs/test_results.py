"""The page of results says what the committed comparisons say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> Any:
    spec = importlib.util.spec_from_file_location(
        "report", ROOT / "benchmarks/testbed/report_strategies.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(report: Any) -> None:
    documents = report.read_documents()
    assert report.page(documents) == report.PAGE.read_text(encoding="utf-8")


def test_every_strategy_has_a_row_or_a_reason(report: Any) -> None:
    from tokenreduce.plugins import installed

    [found] = [d for name, d in report.read_documents().items() if name == "testbed-b"]
    assert found.data.samples >= 1000
    assert found.versions.keys() >= {"python", "torch", "transformers", "tokenreduce"}
    listed = {(r.strategy, site) for r in (*found.runs, *found.refused) for site in r.sites}
    for record in installed().strategies.values():
        if record.distribution.startswith("tokenreduce ") and not record.wraps:
            for site in {"projector", "vision"}.intersection(record.sites):
                assert (record.name, site) in listed
    budgets = {run.budget for run in found.runs} - {""}
    assert budgets == {"reduction=4", "reduction=8", "reduction=16"}
    assert all(run.role == "unreduced" or run.versus for run in found.runs)
