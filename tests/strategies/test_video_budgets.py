"""Video strategies meet the budget on every clip, alone and in a batch, whatever the motion."""

import pytest
import torch

from support.clips import structured_clip
from tokenreduce import VisualTokens, create_strategy
from tokenreduce.plugins import installed
from tokenreduce.testing.subject import (
    assignment_problem,
    equal_reductions,
    feature_problem,
    position_problem,
)

STRATEGIES = (
    "evs",
    "vidcom2",
    "dycoke",
    "aim",
    "flashvid",
    "scissor",
    "sttm",
    "holitom",
    "framefusion",
    "vcast",
    "fastvid",
    "prunevid",
)

GRIDS = (
    (1, 1, 1),
    (1, 4, 5),
    (2, 1, 1),
    (3, 1, 4),
    (4, 2, 2),
    (5, 3, 3),
    (7, 4, 3),
    (9, 2, 5),
    (18, 3, 2),
)


def clip(grid, *, kind="moving", batch=1, seed=0):
    made = structured_clip(batch, grid, 12, seed=seed)
    features = made.features
    if kind == "still":
        features = features[:, :1].expand_as(features).contiguous()
    elif kind == "zeros":
        features = torch.zeros_like(features)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(features.shape[:3], generator=generator)
    signals = {"class_attention": attention / attention.sum((1, 2), keepdim=True)}
    return made._replace(features=features).tokens(**signals)


def budgets(n):
    return sorted({k for k in (1, 2, 3, n // 16, n // 4, n // 2, n - 1) if 1 <= k <= n})


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_budget_is_met(name, grid):
    for kind in ("moving", "still", "zeros"):
        tokens = clip(grid, kind=kind, batch=2)
        for keep in budgets(tokens.count):
            reduction = create_strategy(name, keep=keep)(tokens)
            assert reduction.kept == keep, (kind, keep)
            problem = (
                position_problem(reduction, tokens.count)
                or assignment_problem(reduction)
                or feature_problem(reduction, tokens)
            )
            assert not problem, (kind, keep, problem)


@pytest.mark.parametrize("name", STRATEGIES)
def test_alone_and_in_a_batch(name):
    for kind in ("moving", "still"):
        batch = clip((7, 4, 5), kind=kind, batch=3)
        for keep in (3, 20, 70):
            strategy = create_strategy(name, keep=keep)
            together = strategy(batch)
            for b in range(3):
                assert not equal_reductions(strategy(batch.item(b)), together.item(b))


@pytest.mark.parametrize("name", STRATEGIES)
def test_half_precision(name):
    tokens = clip((6, 4, 4), batch=2)
    for dtype in (torch.bfloat16, torch.float16):
        half = VisualTokens(tokens.features.to(dtype), tokens.layout, signals=tokens.signals)
        reduction = create_strategy(name, keep=20)(half)
        assert reduction.features.dtype == dtype
        assert not feature_problem(reduction, half)
        # Accumulation is in float32: the same as for the widened features.
        wide = VisualTokens(half.features.float(), half.layout, signals=half.signals)
        assert reduction.positions.equal(create_strategy(name, keep=20)(wide).positions)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_record_says_that_it_needs_a_grid(name):
    record = next(r for r in installed().strategies.values() if r.name == name)
    assert record.needs_grid
