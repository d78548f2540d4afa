"""The pages of results say what the committed comparisons say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/testbed/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report() -> Any:
    return script("report_strategies")


@pytest.fixture
def clips_report(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib", reason="an optional extra")
    monkeypatch.syspath_prepend(ROOT / "benchmarks/testbed")
    return script("report_video")


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


def test_the_page_on_clips_is_up_to_date(clips_report: Any) -> None:
    assert clips_report.page() == clips_report.PAGE.read_text(encoding="utf-8")


def test_conditions_are_the_hardest_that_the_unreduced_model_bears(clips_report: Any) -> None:
    choice = clips_report.read("clip_conditions")
    strengths: dict[str, list[dict[str, Any]]] = {}
    for row in choice["rows"]:
        strengths.setdefault(row["condition"], []).append(row)
    assert strengths.keys() == choice["chosen"].keys() == clips_report.DESCRIBED.keys()
    for name, rows in strengths.items():
        borne = [row["motion"] >= choice["least_motion"] for row in rows]
        last = borne.index(False) if False in borne else len(rows)
        assert rows[last - 1]["conditions"] == choice["chosen"][name]
        document = clips_report.read(f"testbed_video_{name}")
        assert document["conditions"] == choice["chosen"][name]
        assert document["scene_seed"] not in choice["clip_seeds"]
        compared = {(row["strategy"], row["reduction"]) for row in document["rows"]}
        assert compared >= {
            (strategy, reduction)
            for strategy in ("lftr", *clips_report.COMPARED)
            for reduction in (4.0, 8.0, 16.0)
        }
