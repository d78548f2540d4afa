"""Outcomes of stages before the LLM, carried to where it reads."""

from __future__ import annotations

import torch

import tokenreduce as tr
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
