"""Outcomes of stages before the LLM, carried to where it reads."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

import tokenreduce as tr
from support.reducers import EveryOther
from tokenreduce.errors import PipelineError
from tokenreduce.packing import PackedTokens
from tokenreduce.receipt import StageReceipt
from tokenreduce.reduction import Reduction
from tokenreduce.stage import ItemOutcome, join_outcomes, run_stages


def outcome(count: int, kept: list[int] | None) -> ItemOutcome:
    places = tr.VisualTokens(torch.empty(1, count, 0), tr.Layout.line(count))
    receipt = StageReceipt(
        strategy="by hand",
        site="vision",
        tokens_in=count,
        tokens_out=count if kept is None else len(kept),
        reason="kept all" if kept is None else "",
    )
    reduction = None if kept is None else Reduction.from_kept(places, torch.tensor([kept]))
    return ItemOutcome(reduction=reduction, stages=(receipt,))


def test_earlier_outcomes_are_applied_to_what_the_llm_reads() -> None:
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    packed = PackedTokens(features=features, layouts=(tr.Layout.line(5), tr.Layout.line(4)))
    done = [outcome(5, [1, 3]), outcome(4, None)]
    first, second = run_stages([], packed, [0, 0], earlier=done)
    assert first.reduction is not None
    assert torch.equal(first.reduction.features[0], features[[1, 3]])
    assert second.reduction is None
    stage = tr.Stage(reducer=tr.create_strategy("norm-topk", keep=1))
    first, second = run_stages([stage], packed, [0, 0], earlier=done)
    assert first.reduction is not None
    assert second.reduction is not None
    best = max((1, 3), key=lambda i: float(features[i].norm()))
    assert first.reduction.positions.tolist() == [[best]]
    assert [receipt.tokens_in for receipt in first.stages] == [5, 2]
    assert [receipt.tokens_out for receipt in second.stages] == [4, 1]


def test_outcomes_of_tiles_join_end_to_end() -> None:
    joined = join_outcomes([outcome(3, [0, 2]), outcome(2, None), outcome(3, [1])])
    assert joined.reduction is not None
    assert joined.reduction.positions.tolist() == [[0, 2, 3, 4, 6]]
    assert joined.reduction.assignment.tolist() == [[0, -1, 1, 2, 3, -1, 4, -1]]
    [receipt] = joined.stages
    assert (receipt.tokens_in, receipt.tokens_out, receipt.reason) == (8, 5, "kept all")
    assert join_outcomes([outcome(3, None), outcome(2, None)]).reduction is None


@pytest.mark.parametrize(
    ("share", "depth", "layer"),
    [
        (0.25, 32, 8),
        (0.25, 30, 8),  # 7.5, half up
        (0.1, 25, 3),  # 2.5 as typed, though no double is a tenth
        (Fraction(1, 3), 27, 9),
        (0.75, 28, 21),
        (0.01, 4, 1),
        (0.99, 4, 4),
    ],
)
def test_shares_of_the_depth_become_layers(share: Any, depth: int, layer: int) -> None:
    one = tr.Stage(reducer=EveryOther(keep=2), site="decoder", layer=share)
    assert one.relative
    assert one.within(depth) == tr.Stage(reducer=EveryOther(keep=2), site="decoder", layer=layer)
    many = tr.Stage(reducer=EveryOther(), site="decoder", schedule={share: 0.5})
    assert many.within(depth).layers == (layer,)
    assert not many.within(depth).relative


def test_a_schedule_of_shares_keeps_its_order() -> None:
    stage = tr.Stage(reducer=EveryOther(), site="decoder", schedule={0.75: 0, 0.25: 0.5, 0.5: 0.25})
    assert stage.within(32).schedule == ((8, 0.5), (16, 0.25), (24, 0))
    assert stage.within(28).schedule == ((7, 0.5), (14, 0.25), (21, 0))
    whole = tr.Stage(reducer=EveryOther(), site="decoder", schedule={2: 0.5})
    assert whole.within(28) is whole
    with pytest.raises(PipelineError, match="depends on the model"):
        stage.layers  # noqa: B018
    with pytest.raises(PipelineError, match="come to the layers 1, 1, 2"):
        stage.within(2)


@pytest.mark.parametrize(
    ("site", "options", "words"),
    [
        ("decoder", {"layer": 1.0}, "no layer"),
        ("decoder", {"layer": 1.5}, "no layer"),
        ("decoder", {"layer": 0.0}, "no layer"),
        ("decoder", {"layer": float("nan")}, "no layer"),
        ("decoder", {"layer": True}, "no layer"),
        ("decoder", {"layer": "half"}, "no layer"),
        ("decoder", {"schedule": {0.25: 0.5, 16: 0.25}}, "at once"),
        ("decoder", {"schedule": [(0.5, 0.5), (0.5, 0.25)]}, "twice"),
        ("vision", {"layer": 0.5}, "served at the decoder site"),
        ("vision", {"schedule": {0.5: 0.5}}, "served at the decoder site"),
    ],
)
def test_shares_that_name_no_layer(site: Any, options: Any, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        tr.Stage(reducer=EveryOther(), site=site, **options)
