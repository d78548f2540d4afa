"""The page shows what the JSON says."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from support import comparisons
from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.cli.app import app
from tokenreduce_integrations.evaluation.examples import Example, choose_rows, find_examples
from tokenreduce_integrations.evaluation.report import render_report, write_report
from tokenreduce_integrations.evaluation.schema import COMPARISON_FILE, Comparison

VOID = {"meta", "link", "img", "line", "path", "circle", "rect", "polyline", "br"}


class Page(HTMLParser):
    """Elements in order: tag, attributes and own text; checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = {"tag": tag, "text": "", "up": [e["at"] for e in self.open], **dict(attrs)}
        element["at"] = len(self.elements)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def inside(self, within: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
        return [e for e in self.find(**wanted) if within["at"] in e["up"]]

    def find(self, **wanted: str) -> list[dict[str, Any]]:
        names = {name.replace("_", "-"): value for name, value in wanted.items()}
        return [e for e in self.elements if all(e.get(n) == v for n, v in names.items())]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return comparisons.testbed()


@pytest.fixture(scope="module")
def examples(comparison: Comparison) -> list[Example]:
    return find_examples(comparison, each=1, most_runs=3)


@pytest.fixture(scope="module")
def page(comparison: Comparison, examples: list[Example]) -> Page:
    return Page(render_report(comparison, examples))


def cells(page: Page, table: str, run: str) -> dict[str, str]:
    [found] = page.find(id=table)
    [row] = page.inside(found, tag="tr", data_run=run)
    return {cell["data-field"]: cell["text"] for cell in page.inside(row, tag="td")}


def test_the_table_says_what_the_json_says(comparison: Comparison, page: Page) -> None:
    document = json.loads((comparison.folder / COMPARISON_FILE).read_text())
    assert len(page.inside(page.find(id="runs")[0], tag="tr")) == 1 + len(document["runs"])
    names = {run["name"]: run for run in document["runs"]}
    for run in document["runs"]:
        shown = cells(page, "runs", run["name"])
        for field in ("accuracy", "share"):
            if run[field] is None:
                assert shown[field] == ""
                continue
            value, low, high = re.findall(r"-?[\d.]+", shown[field])
            for text, key in ((value, "value"), (low, "low"), (high, "high")):
                assert float(text) == pytest.approx(100 * run[field][key], abs=0.0501)
        kept, given = shown["tokens_out"].split(" of ")
        assert float(kept) == pytest.approx(run["tokens"]["tokens_out"], abs=0.0501)
        assert float(given) == pytest.approx(run["tokens"]["tokens_in"], abs=0.0501)
        layers = run["tokens"]["layer_average"]
        assert float(shown["layer_average"]) == pytest.approx(layers, abs=0.0501)
        for part in ("encoder", "selection", "prefill", "decode", "first_token"):
            assert float(shown[part]) == pytest.approx(run["cost"]["times_ms"][part], abs=0.00501)
        flops = run["cost"]["flops"]["total"] / 1e9
        assert float(shown["flops"]) == pytest.approx(flops, abs=0.000501)
        assert float(shown["kv_bytes"]) == pytest.approx(run["cost"]["kv_bytes"] / 1024, abs=0.0501)
        assert shown["sites"] == ", ".join(run["sites"])
        assert (shown["strategy"], shown["budget"]) == (run["strategy"], run["budget"])
        expected = {}
        for versus in run["versus"]:
            other = names[versus["other"]]
            expected[f"versus-{other['strategy'] or other['role']}"] = versus
        differences = {f: t for f, t in shown.items() if f.startswith("versus-") and t}
        assert differences.keys() == expected.keys()
        for field, versus in expected.items():
            value, low, high = re.findall(r"[-+][\d.]+", differences[field])
            for text, key in ((value, "value"), (low, "low"), (high, "high")):
                assert float(text) == pytest.approx(100 * versus["difference"][key], abs=0.0501)
            assert ("*" in differences[field]) == (versus["p_holm"] < 0.05)
        kinds = cells(page, "kinds", run["name"])
        assert kinds.keys() == run["kinds"].keys()
        for kind, text in kinds.items():
            assert float(text) == pytest.approx(100 * run["kinds"][kind]["accuracy"], abs=0.0501)


def test_every_run_is_a_mark_at_its_cost(comparison: Comparison, page: Page) -> None:
    for axis in ("tokens", "flops", "time"):
        [figure] = page.find(tag="figure", data_axis=axis)
        marks = page.inside(figure, tag="g")
        assert [mark["data-run"] for mark in marks] == [run.name for run in comparison.runs]
        [drawing] = page.inside(figure, tag="svg")
        assert all(name in drawing["aria-label"] for name in comparison.pareto[axis])
        [line] = page.inside(figure, tag="polyline") or [{"points": ""}]
        assert len(line["points"].split()) in (0, len(comparison.pareto[axis]))
        lower = np.array([float(m["cy"]) for m in page.inside(figure, tag="circle")])
        right = [run.accuracy.value for run in comparison.runs if run.role == "strategy"]
        # Higher on the page is better.
        assert (np.argsort(-lower, kind="stable") == np.argsort(right, kind="stable")).all()


def test_answers_are_those_of_the_rows(
    comparison: Comparison, examples: list[Example], page: Page
) -> None:
    assert {example.row.correct for example in examples} == {True, False}
    for example in examples:
        rows = {row.id: row for row in comparison.rows(comparison.run(example.run))}
        row = rows[example.row.id]
        [figure] = page.find(tag="figure", data_run=example.run, data_sample=row.id)
        text = figure["text"]
        assert f"{row.prediction}: {'right' if row.correct else 'wrong'}" in text
        assert row.question in text
        assert (f"should be {row.answer}" in text) == (not row.correct)
        kept, given = row.receipt["tokens_out"], row.receipt["tokens_in"]
        assert f"{given} to {kept} tokens" in text
        [picture] = page.inside(figure, tag="img")
        kind, encoded = picture["src"].split(",")
        assert kind == "data:image/webp;base64"
        assert str(kept) in picture["alt"]
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as drawn:
            assert drawn.size == (int(picture["width"]), int(picture["height"]))


def test_what_cannot_run_says_why(comparison: Comparison, page: Page) -> None:
    assert [one.strategy for one in comparison.refused] == ["trim", "trim"]
    for one in comparison.refused:
        [row] = page.find(tag="tr", data_refused=one.name)
        assert one.reason in row["text"]


def test_the_page_asks_for_nothing_and_can_be_read_by_anyone(page: Page, examples: Any) -> None:
    for element in page.elements:
        for name in ("src", "href", "action"):
            assert element.get(name, "data:").startswith("data:")
        if element["tag"] == "img":
            assert element["alt"]
    [policy] = page.find(http_equiv="Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none'")
    [html] = page.find(tag="html")
    assert html["lang"] == "en"
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for table in page.find(tag="table"):
        assert all(e.get("scope") for e in page.inside(table, tag="th"))


def test_what_others_wrote_is_text(comparison: Comparison) -> None:
    evil = "<script>alert(1)</script>\"'&"
    runs = tuple(replace(run, strategy=evil, budget=evil) for run in comparison.runs)
    text = render_report(
        replace(comparison, runs=runs, device=evil, data=replace(comparison.data, source=evil))
    )
    page = Page(text)
    assert len(page.find(tag="script")) == 1
    assert evil in page.find(tag="h1")[0]["text"]
    assert cells(page, "runs", runs[1].name)["strategy"] == evil


def test_costs_that_were_not_measured_are_left_out(comparison: Comparison) -> None:
    bare = replace(comparison, runs=tuple(replace(run, cost=None) for run in comparison.runs))
    page = Page(render_report(bare))
    assert not page.find(data_field="prefill")
    assert [f["data-axis"] for f in page.find(tag="figure")] == ["tokens"]


def test_wrong_answers_that_reducing_cost_come_first(comparison: Comparison) -> None:
    run = min(comparison.runs, key=lambda run: run.accuracy.value)
    rows = list(comparison.rows(run))
    wrong = [row for row in rows if not row.correct]
    lost = wrong[-1]
    unreduced = {row.id: row.correct or row.id == lost.id for row in rows}
    chosen = choose_rows(rows, unreduced, 2)
    assert [row.correct for row in chosen] == [True, True, False, False]
    assert chosen[2] == lost
    assert chosen[0].group != chosen[1].group
    assert chosen[2].group != chosen[3].group


def test_an_overlay_of_something_else_is_refused(comparison: Comparison, tmp_path: Path) -> None:
    run = next(run for run in comparison.runs if run.role == "strategy")
    other = replace(run, pipeline=run.pipeline.replace("reduction: 4", "reduction: 2"))
    assert other != run
    with pytest.raises(EvaluationError, match="evaluate again"):
        find_examples(replace(comparison, runs=(comparison.runs[0], other)), each=1)
    with pytest.raises(EvaluationError, match="cannot be written"):
        write_report(comparison, tmp_path / "no" / "report.html")


def test_the_command_writes_the_page(comparison: Comparison, tmp_path: Path) -> None:
    """Of what was evaluated before: no question is asked twice."""
    shutil.copytree(comparison.folder.parent, tmp_path / "x")
    arguments = [
        "compare", str(tmp_path / "x/sweep.yaml"), str(tmp_path / "x/fastv.yaml"), "--data",
        "testbed,scenes=12", "--batch-size", "16", "--cost-rounds", "0",
        "--out", str(tmp_path / "x/out"), "--html", str(tmp_path / "report.html"),
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "report.html").read_text())
    shown = {figure["data-run"] for figure in page.find(tag="figure") if "data-run" in figure}
    assert {"lftr reduction=4", "fastv"} <= shown
    for run in comparison.runs:
        assert f"{100 * run.accuracy.value:.1f} [" in cells(page, "runs", run.name)["accuracy"]
