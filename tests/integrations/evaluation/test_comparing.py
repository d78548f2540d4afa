"""Comparisons: what is run, what is refused, and the figures that come out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenreduce.errors import EvaluationError, MissingSignal, PipelineError
from tokenreduce_integrations.evaluation import evaluating, plotting
from tokenreduce_integrations.evaluation.comparing import Options, compare, pareto_front, rows_file
from tokenreduce_integrations.evaluation.data import Questions, load_questions
from tokenreduce_integrations.evaluation.planning import Plan, load_plan
from tokenreduce_integrations.evaluation.schema import Comparison, Estimate, Run, read_comparison
from tokenreduce_integrations.evaluation.statistics import holm
from tokenreduce_integrations.evaluation.summaries import bootstrap_of, correct_of

MODEL = '{path: "testbed:b", dtype: float32, device: cpu}'
SWEEP = f"""
model: {MODEL}
reduce:
  - {{strategy: lftr, reduction: 8}}
sweep:
  reduce.0.strategy: [lftr, "trim", "random"]
  reduce.0.reduction: [8, 16]
references: [divprune]
data: testbed,seed=5,scenes=4
"""
TWO_STAGES = f"""
model: {MODEL}
reduce:
  - {{strategy: divprune, keep: 40}}
  - {{strategy: fastv, site: decoder, layer: 2, keep_ratio: 0.5}}
"""


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.fixture(scope="module")
def small() -> Questions:
    return load_questions("testbed,seed=5,scenes=4")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, small: Questions) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("swept")
    plan = load_plan([write(folder, "sweep.yaml", SWEEP)])
    return compare(plan, small, folder / "out", Options(cost_rounds=1)), folder / "out"


def names(plan: Plan, role: str) -> list[str]:
    return [entry.name for entry in plan.entries if entry.role == role]


def test_a_sweep_is_every_combination_and_the_controls(tmp_path: Path) -> None:
    plan = load_plan([write(tmp_path, "sweep.yaml", SWEEP)])
    assert names(plan, "strategy") == [
        "lftr reduction=8",
        "lftr reduction=16",
        "trim reduction=8",
        "trim reduction=16",
        "divprune reduction=8",
        "divprune reduction=16",
    ]
    assert sorted(names(plan, "control")) == sorted(
        f"{name} reduction={reduction}"
        for name in ("random", "uniform", "avg-pool")
        for reduction in (8, 16)
    )
    assert names(plan, "unreduced") == ["unreduced"]
    assert plan.data == "testbed,seed=5,scenes=4"


def test_patterns_stand_for_the_strategies_of_the_site(tmp_path: Path) -> None:
    text = SWEEP.replace('[lftr, "trim", "random"]', '["*"]').replace("[8, 16]", "[8]")
    text = text.replace("sweep:\n", "sweep:\n  reduce.0.site: [projector, vision]\n")
    plan = load_plan([write(tmp_path, "sweep.yaml", text)])
    inside = [entry.strategy for entry in plan.entries if entry.sites == ("vision",)]
    assert inside == ["dymu", "pitome", "tome"]
    everywhere = {entry.strategy for entry in plan.entries} | {r.strategy for r in plan.refused}
    assert {"visionzip", "cdpruner", "space-to-depth", "uniform"} <= everywhere
    assert not {"chain", "fastv"} & everywhere
    assert [r.strategy for r in plan.refused] == ["space-to-depth"]


def test_other_keys_name_their_runs(tmp_path: Path) -> None:
    text = SWEEP.replace('strategy: [lftr, "trim", "random"]', "spare: [1.5, 3.0]")
    plan = load_plan([write(tmp_path, "sweep.yaml", text)])
    assert "lftr reduction=16 | reduce.0.spare=1.5" in names(plan, "strategy")
    models = SWEEP.replace("sweep:", "sweep:\n  model.path: ['testbed:a', 'testbed:b']")
    plan = load_plan([write(tmp_path, "models.yaml", models)])
    assert len(names(plan, "unreduced")) == 2
    assert len({entry.name for entry in plan.entries}) == len(plan.entries)


BARE = "reduce: [{strategy: lftr, reduction: 8}]\nsweep: {reduce.0.reduction: [3]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SWEEP.replace("[8, 16]", "8"), "lists of values"),
        (SWEEP.replace("reduction: [8, 16]", "keep: [9]"), "nothing to compare.*at once"),
        (BARE, "names no model"),
        ("reduce: [", "not valid YAML"),
    ],
)
def test_malformed_plans_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        load_plan([write(tmp_path, "sweep.yaml", text)])


def test_equal_names_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "one.yaml", TWO_STAGES)
    with pytest.raises(PipelineError, match="two pipelines are called 'one'"):
        load_plan([file, file])


def test_figures_follow_from_the_rows(swept: tuple[Comparison, Path]) -> None:
    found, folder = swept
    whole = found.runs[0]
    assert (whole.role, whole.tokens.tokens_out, whole.share) == ("unreduced", 144, None)
    rows = {run.name: list(found_rows(folder, run)) for run in found.runs}
    for run in found.runs:
        mine = rows[run.name]
        bootstrap, correct = bootstrap_of(mine), correct_of(mine)
        assert run.accuracy.value == pytest.approx(bootstrap.macro(correct).value, abs=1e-4)
        assert run.micro.value == pytest.approx(np.mean(correct), abs=1e-4)
        assert run.tokens.tokens_out == np.mean([row.receipt["tokens_out"] for row in mine])
        assert sum(kind.questions for kind in run.kinds.values()) == len(mine)
        for versus in run.versus:
            other = correct_of(rows[versus.other])
            assert versus.wins == int((correct & ~other).sum())
            assert versus.losses == int((other & ~correct).sum())
            expected = bootstrap.difference(correct, other)
            assert versus.difference.value == pytest.approx(expected.value, abs=1e-4)
            assert versus.test == "sign-flip"
        assert run.cost is not None
        assert run.cost.flops["total"] > 0
        assert set(run.cost.times_ms) == {
            "encoder", "selection", "prefill", "decode", "first_token"
        }  # fmt: skip
    lftr = found.run("lftr reduction=16")
    assert [v.other for v in lftr.versus] == [
        "unreduced",
        *(f"{name} reduction=16" for name in ("random", "uniform", "avg-pool", "divprune")),
    ]
    assert lftr.cost is not None
    assert whole.cost is not None
    assert lftr.cost.flops["llm"] < whole.cost.flops["llm"]
    every = [versus for run in found.runs for versus in run.versus]
    assert [v.p_holm for v in every] == pytest.approx(holm([v.p for v in every]), rel=0.01)


def found_rows(folder: Path, run: Run) -> Any:
    return read_comparison(folder).rows(run)


def test_what_cannot_run_is_listed(swept: tuple[Comparison, Path]) -> None:
    found, _ = swept
    assert [r.name for r in found.refused] == ["trim reduction=8", "trim reduction=16"]
    assert "joint_text_embeddings" in found.refused[0].reason


def test_the_document_is_what_was_returned(swept: tuple[Comparison, Path]) -> None:
    found, folder = swept
    assert read_comparison(folder) == found
    rows = found_rows(folder, found.run("lftr reduction=8"))
    assert all(row.receipt["items"][0]["stages"][0]["strategy"] == "lftr" for row in rows)


def test_a_comparison_is_continued(
    swept: tuple[Comparison, Path], small: Questions, tmp_path: Path
) -> None:
    found, folder = swept
    plan = load_plan([write(tmp_path, "sweep.yaml", SWEEP)])
    file = folder / rows_file("lftr reduction=8")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = compare(plan, small, folder, Options(cost_rounds=0))
    bare = [replace(run, cost=None) for run in found.runs]
    assert list(again.runs) == bare
    other = write(tmp_path, "sweep.yaml", SWEEP.replace("lftr, red", "lftr, spare: 3.0, red"))
    with pytest.raises(EvaluationError, match="begun with another pipeline"):
        compare(load_plan([other]), small, folder, Options())
    with pytest.raises(EvaluationError, match="begun with another data"):
        compare(plan, load_questions("testbed,seed=6,scenes=4"), folder, Options())


def test_pipelines_of_several_stages_get_controls_of_their_tokens(
    small: Questions, tmp_path: Path
) -> None:
    plan = load_plan([write(tmp_path, "both.yaml", TWO_STAGES)])
    found = compare(plan, small, tmp_path / "out", Options(cost_rounds=0))
    both = found.run("both")
    # 40 tokens in two of the four layers, 20 in the others.
    assert both.tokens.layer_average == 30
    assert [v.other for v in both.versus] == [
        "unreduced",
        *(f"{name} keep_ratio=0.2083" for name in ("random", "uniform", "avg-pool")),
    ]
    assert found.run("random keep_ratio=0.2083").tokens.layer_average == 30
    [row, *_] = read_comparison(tmp_path / "out").rows(both)
    assert [s["tokens_out"] for s in row.receipt["items"][0]["stages"]] == [40, 20]
    assert found.pareto["flops"] == found.pareto["time"] == ()


def test_what_was_asked_for_by_name_must_run(small: Questions, tmp_path: Path) -> None:
    text = f"model: {MODEL}\nreduce: [{{strategy: trim, reduction: 8}}]"
    plan = load_plan([write(tmp_path, "trim.yaml", text)])
    with pytest.raises(MissingSignal):
        compare(plan, small, tmp_path / "out", Options(cost_rounds=0))


def test_mcnemar_where_every_question_has_its_picture(small: Questions, tmp_path: Path) -> None:
    alone = [next(s for s in small.samples if s.group == group) for group in small.groups]
    plan = load_plan([write(tmp_path, "one.yaml", TWO_STAGES.replace("fastv", "norm-topk"))])
    questions = replace(small, samples=tuple(alone))
    found = compare(plan, questions, tmp_path / "out", Options(cost_rounds=0))
    assert found.method.independent
    assert {v.test for run in found.runs for v in run.versus} == {"mcnemar"}


def test_the_pareto_front_by_hand(swept: tuple[Comparison, Path]) -> None:
    points = {
        "whole": (0.9, 144),
        "good": (0.9, 20),
        "bad": (0.5, 30),
        "small": (0.4, 9),
        "tie": (0.3, 9),
    }
    like = swept[0].runs[0]
    runs = [
        replace(
            like,
            name=name,
            accuracy=Estimate(value=value, low=0, high=1),
            tokens=replace(like.tokens, layer_average=tokens),
        )
        for name, (value, tokens) in points.items()
    ]
    assert pareto_front(runs, lambda run: run.tokens.layer_average) == ("small", "good")
    assert pareto_front(runs, lambda run: None) == ()


def test_the_plot(swept: tuple[Comparison, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="an optional extra")
    plotting.draw_pareto(swept[0], tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"


def test_equal_batches_whatever_the_pipeline(swept: tuple[Comparison, Path]) -> None:
    found, folder = swept
    documents = [json.loads((folder / run.rows).read_text().splitlines()[0]) for run in found.runs]
    assert {d["settings"]["encoded"] for d in documents} == {"once a picture"}
    assert {d["data_digest"] for d in documents} == {found.data.digest}
    assert {d["settings"]["batch_size"] for d in documents} == {evaluating.BATCH_SIZE}
