"""Documents of evaluations and comparisons are read back as they were written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.evaluation import schema
from tokenreduce_integrations.evaluation.schema import (
    Comparison,
    Cost,
    Data,
    Estimate,
    Header,
    Kind,
    Method,
    Refusal,
    Row,
    Run,
    TokenCounts,
    Versus,
)

HEADER = Header(
    pipeline="reduce: []",
    pipeline_digest="p",
    data="testbed",
    data_digest="d",
    settings={"batch_size": 4},
    versions={"torch": "2"},
    samples=1,
)
ROW = Row(
    id="1",
    group="0",
    kind="color",
    modality="image",
    media={"path": "é.png"},
    question="what ?",
    answer="red",
    alternatives=("crimson",),
    prediction="red",
    correct=True,
    receipt={"tokens_in": 4, "tokens_out": 2, "items": []},
    seconds=dict.fromkeys(schema.PARTS, 0.5),
)
ESTIMATE = Estimate(value=0.5, low=0.25, high=0.75)
RUN = Run(
    name="lftr",
    role="strategy",
    strategy="lftr",
    sites=("projector",),
    budget="reduction=8",
    pipeline="reduce: []",
    digest="p",
    rows="runs/lftr.jsonl",
    model="testbed:b",
    accuracy=ESTIMATE,
    micro=ESTIMATE,
    share=ESTIMATE,
    kinds={"color": Kind(accuracy=0.5, questions=2)},
    tokens=TokenCounts(tokens_in=4, tokens_out=2, layer_average=2, least=2, most=2),
    cost=Cost(flops={"total": 7}, kv_bytes=8, times_ms={"decode": 1.0}, decode_tokens=3),
    versus=(
        Versus(
            other="random", difference=ESTIMATE, wins=3, losses=1, test="sign-flip", p=0.1, p_holm=1
        ),
    ),
)
COMPARISON = Comparison(
    data=Data(source="testbed", digest="d", modality="image", samples=1, groups=1),
    method=Method(
        confidence=0.95,
        resamples=10,
        flips=9,
        seed=0,
        independent=True,
        correction="holm",
        cost_rounds=0,
    ),
    device="cpu",
    versions={"torch": "2"},
    runs=(RUN, replace(RUN, name="unreduced", share=None, cost=None, versus=())),
    refused=(Refusal(name="trim", strategy="trim", sites=("projector",), reason="no signal"),),
    pareto={"tokens": ("lftr",)},
)


def write(folder: Path) -> None:
    (folder / "runs").mkdir()
    (folder / schema.COMPARISON_FILE).write_text(json.dumps(COMPARISON.as_dict()))
    lines = schema.line_of(HEADER) + schema.line_of(ROW)
    (folder / "runs/lftr.jsonl").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("name", ["", schema.COMPARISON_FILE])
def test_a_comparison_is_read_back(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    read = schema.read_comparison(tmp_path / name)
    assert read == COMPARISON
    assert read.run("unreduced").share is None
    assert list(read.rows(read.run("lftr"))) == [ROW]
    assert schema.read_header(tmp_path / "runs/lftr.jsonl") == HEADER


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / schema.COMPARISON_FILE
    document = json.loads(file.read_text())
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"schema": "other"}, "'other'"),
        ({"device": 3, "colour": 1}, "no field 'colour'"),
    ):
        file.write_text(json.dumps({**document, **change}))
        with pytest.raises(EvaluationError, match=message):
            schema.read_comparison(tmp_path)
    del document["runs"][0]["accuracy"]["low"]
    file.write_text(json.dumps(document))
    with pytest.raises(EvaluationError, match="low"):
        schema.read_comparison(tmp_path)
    file.write_text("[")
    with pytest.raises(EvaluationError, match="not JSON"):
        schema.read_comparison(tmp_path)
    with pytest.raises(EvaluationError, match="no run 'x'"):
        COMPARISON.run("x")
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(COMPARISON.rows(replace(RUN, rows="absent")))
