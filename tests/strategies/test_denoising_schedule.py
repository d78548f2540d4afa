"""A schedule on plain tensors, where there are no steps, and as data."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from support.reducers import EveryOther, UnevenRandom
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedSite
from tokenreduce.reducer import Reducer
from tokenreduce_strategies.denoising_schedule import DenoisingSchedule


def image(batch: int = 2) -> tr.VisualTokens:
    features = torch.randn(batch, 24, 8, generator=torch.Generator().manual_seed(0))
    return tr.VisualTokens.from_grid(features, (4, 6))


@pytest.mark.parametrize("inner", [EveryOther(), tr.create_strategy("divprune")])
def test_on_tensors_it_is_the_inner_strategy(inner: Reducer) -> None:
    tokens = image()
    expected = inner.with_budget(keep=7)(tokens)
    own = DenoisingSchedule(inner=inner, keep=7)
    left = DenoisingSchedule(inner=inner.with_budget(keep=7))
    for reducer in (own, left):
        result = reducer(tokens)
        assert torch.equal(result.positions, expected.positions)
        assert torch.equal(result.assignment, expected.assignment)
        assert torch.equal(result.features, expected.features)


def test_one_that_decides_alone_needs_no_budget() -> None:
    tokens = image(batch=1)
    result = DenoisingSchedule(inner=UnevenRandom())(tokens)
    assert torch.equal(result.positions, UnevenRandom()(tokens).positions)


def test_the_step_is_data() -> None:
    inner = tr.create_strategy("divprune", reduction=4)
    reducer = tr.create_strategy("denoising-schedule", inner=inner, from_step=8)
    assert reducer.from_step == 8
    assert inner.from_step == 0
    assert tr.create_strategy("denoising-schedule", inner=inner).from_step == 24
    assert reducer.needs == inner.needs
    pipeline = tr.load_pipeline(
        {
            "reduce": [
                {
                    "strategy": "denoising-schedule",
                    "from_step": 8,
                    "inner": {"strategy": "divprune", "reduction": 4},
                }
            ]
        }
    )
    assert pipeline.stages[0].reducer == reducer
    assert "from_step: 8" in tr.dump_pipeline(pipeline)


@pytest.mark.parametrize("step", [0, -1, 1.5, True, "3"])
def test_steps_out_of_range(step: object) -> None:
    with pytest.raises(PipelineError, match="from_step"):
        DenoisingSchedule(inner=UnevenRandom(), from_step=step)  # type: ignore[arg-type]


def test_what_it_cannot_be_part_of() -> None:
    schedule = DenoisingSchedule(inner=UnevenRandom())
    for wrap in (tr.per_frame, tr.chain, lambda inner: DenoisingSchedule(inner=inner)):
        with pytest.raises(PipelineError, match="Let denoising-schedule wrap the others"):
            wrap(schedule)
    with pytest.raises(PipelineError, match="takes reducers"):
        DenoisingSchedule(inner="divprune")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="two budgets"):
        DenoisingSchedule(inner=EveryOther(keep=4), keep=4)
    with pytest.raises(UnsupportedSite, match="it runs at: projector"):
        tr.Stage(reducer=schedule, site="vision")
