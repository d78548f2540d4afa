"""Wrappers: the same as applying the inner reducer to each part by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tokenreduce as tr
from support.reducers import EveryOther, UnevenRandom
from tokenreduce import wrappers
from tokenreduce.errors import BudgetError, PipelineError, ReductionError, TokensError
from tokenreduce.reducer import Reducer
from tokenreduce.wrappers import Chain

TOPK = tr.create_strategy("norm-topk")


def clip(frames: int = 5, side: int = 3, batch: int = 2) -> tr.VisualTokens:
    generator = torch.Generator().manual_seed(0)
    return tr.VisualTokens.from_grid(
        torch.randn(batch, frames * side * side, 4, generator=generator), (frames, side, side)
    )


@pytest.mark.parametrize("inner", [TOPK, EveryOther()])
def test_per_frame_is_the_inner_reducer_on_each_frame(inner: Reducer) -> None:
    tokens = clip()
    result = tr.per_frame(inner, keep=10)(tokens)
    assert result.kept == 10
    for b in range(tokens.batch):
        for frame in range(5):
            part = tokens.item(b).select(torch.arange(frame * 9, frame * 9 + 9))
            alone = inner.with_budget(keep=2)(part)
            mine = slice(frame * 2, frame * 2 + 2)
            assert torch.equal(result.positions[b, mine], alone.positions[0] + frame * 9)
            assert torch.allclose(result.features[b, mine], alone.features[0])
            expected = alone.assignment[0]
            shifted = torch.where(expected < 0, -1, expected + frame * 2)
            assert torch.equal(result.assignment[b, frame * 9 : frame * 9 + 9], shifted)


def test_budgets_are_shared_or_left_to_the_inner_reducer() -> None:
    tokens = clip(batch=1)
    assert tr.per_frame(TOPK, keep=12)(tokens).kept == 12
    assert tr.per_frame(tr.create_strategy("norm-topk", keep=2))(tokens).kept == 10
    assert tr.per_segment(TOPK, frames=2, keep_ratio=0.2)(tokens).kept == 9
    with pytest.raises(BudgetError, match="two budgets"):
        tr.per_frame(tr.create_strategy("norm-topk", keep=2), keep=4)
    with pytest.raises(BudgetError, match="no budget"):
        tr.per_frame(TOPK)(tokens)
    with pytest.raises(BudgetError, match="shared among 5 groups"):
        tr.per_frame(TOPK, keep=3)(tokens)
    with pytest.raises(PipelineError, match="at least 1"):
        tr.per_segment(TOPK, frames=0, keep=4)


def test_counts_that_follow_the_layout_pass_through_wrappers() -> None:
    tokens = clip(frames=2, side=4, batch=1)
    result = tr.per_frame(tr.create_strategy("avg-pool"), keep=11)(tokens)
    assert result.kept <= 11


def test_per_tile_groups_by_block() -> None:
    coords = torch.cat([tr.Layout.from_grid((2, 2), block=b).coords for b in range(3)])
    features = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(0))
    result = tr.per_tile(TOPK, keep=6)(tr.VisualTokens(features, coords))
    assert (result.positions[0] // 4).tolist() == [0, 0, 1, 1, 2, 2]


def test_protected_tokens_pass_through_wrappers() -> None:
    tokens = clip(batch=1)
    layout = tokens.layout.protect(torch.arange(45) % 9 == 0)
    result = tr.per_frame(TOPK, keep=5)(tr.VisualTokens(tokens.features, layout))
    assert result.kept == 10
    assert set(range(0, 45, 9)) <= set(result.positions[0].tolist())


@pytest.mark.parametrize("middle", ["divprune", "tome"])
def test_a_chain_of_three_is_each_on_what_the_one_before_left(middle: str) -> None:
    tokens = clip(batch=1)
    first, second, third = (
        tr.create_strategy("tome", keep=20),
        tr.create_strategy(middle, keep=12),
        tr.create_strategy("norm-topk", keep=5),
    )
    one = first(tokens)
    [between] = one.tokens(tokens)
    two = second(between)
    [last] = two.tokens(between)
    expected = one.then(two).then(third(last))
    result = tr.chain(first, second, third)(tokens)
    assert torch.equal(result.features, expected.features)
    assert torch.equal(result.positions, expected.positions)
    assert torch.equal(result.assignment, expected.assignment)


def test_chain_applies_one_after_another() -> None:
    tokens = clip()
    first, second = EveryOther(keep=20), tr.create_strategy("norm-topk", keep=5)
    result = tr.chain(first, second)(tokens)
    for b in range(tokens.batch):
        one = first(tokens.item(b))
        two = second(one.tokens(tokens.item(b))[0])
        assert torch.equal(result.item(b).positions, one.then(two).positions)
        assert torch.allclose(result.item(b).features, two.features)
        assert torch.allclose(result.apply(tokens.features)[b], two.features[0], atol=1e-5)
    with pytest.raises(BudgetError, match="no budget of its own"):
        Chain(reducers=(first,), keep=3)
    with pytest.raises(PipelineError, match="at least one"):
        tr.chain()


def test_items_that_keep_different_counts_do_not_fit_a_dense_batch() -> None:
    tokens = clip(frames=6, side=4, batch=4)
    with pytest.raises(ReductionError, match="different counts"):
        tr.chain(UnevenRandom())(tokens)


@pytest.mark.parametrize("inner", ["divprune", "tome", "lftr"])
def test_groups_that_are_copied_in_runs_change_nothing(monkeypatch, inner) -> None:
    tokens = clip(frames=9, side=4)
    reducer = tr.per_frame(tr.create_strategy(inner), keep=20)
    whole = reducer(tokens)
    monkeypatch.setattr(wrappers, "COPIED_TOKENS", 70)
    runs = reducer(tokens)
    assert runs.positions.equal(whole.positions)
    assert runs.assignment.equal(whole.assignment)
    torch.testing.assert_close(runs.features, whole.features)


PEAK = """
import resource, sys, torch
import tokenreduce as tr
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
frames = 520
reducer = {
    "image": tr.per_frame(tr.create_strategy("divprune"), keep_ratio=0.0625),
    "video": tr.per_segment(tr.create_strategy("dycoke"), frames=8, keep_ratio=0.25),
}[sys.argv[1]]
clip = torch.randn(frames * 196, 512)
reducer(tr.VisualTokens.from_grid(clip[: 196 * 64], (64, 14, 14)))
tokens = tr.VisualTokens.from_grid(clip, (frames, 14, 14))
before = peak()
assert reducer(tokens).kept < 196 * frames
print((peak() - before) / (clip.numel() * 4))
"""


@pytest.mark.parametrize(("kind", "most"), [("image", 0.25), ("video", 0.4)])
def test_a_hundred_thousand_tokens_in_bounded_memory(kind, most) -> None:
    """Beside the features: the result, a quarter for the clip, and a run of groups."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, kind], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= most


@pytest.mark.parametrize(("inner", "reads"), [("fastervlm", False), ("divprune", True)])
def test_a_wrapper_reads_what_its_strategies_read(inner: str, reads: bool) -> None:
    chain = tr.create_strategy(
        "chain",
        reducers=[tr.create_strategy("uniform", keep=9), tr.create_strategy(inner, keep=4)],
    )
    wrapped = tr.create_strategy("per-frame", inner=chain)
    assert chain.reads_features == wrapped.reads_features == reads


@pytest.mark.parametrize("protect", [False, True])
def test_features_that_nobody_reads(protect: bool) -> None:
    layout = tr.Layout.from_grid((3, 4))
    layout = layout.protect(torch.arange(12) == 11) if protect else layout
    attention = torch.arange(12.0)[None] + 1
    features = torch.ones(1, 12, 5)
    features[0, 2, 1] = torch.nan
    tokens = tr.VisualTokens(features, layout, signals={"class_attention": attention})
    assert tr.create_strategy("fastervlm", keep=4)(tokens).features.isfinite().all()
    with pytest.raises(TokensError, match=r"fastervlm.*NaN"):
        tr.create_strategy("fastervlm", keep=10)(tokens)
    with pytest.raises(TokensError, match=r"divprune.*NaN"):
        tr.create_strategy("divprune", keep=4)(tokens)
