"""Reductions: what they apply to, how they compose, and protected tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenreduce as tr
from support.reducers import EveryOther
from tokenreduce.errors import ReductionError
from tokenreduce.ops.merging import MergeWeights


def dense(weights: MergeWeights | None, reduction: tr.Reduction) -> torch.Tensor:
    """The merge as ``(B, M, N)`` matrices."""
    batch, n = reduction.assignment.shape
    matrix = torch.zeros(batch, reduction.kept, n)
    for b in range(batch):
        if weights is None:
            for m, source in enumerate(reduction.positions[b].tolist()):
                matrix[b, m, source] = 1
            continue
        for o, s, v in zip(*(part[b].tolist() for part in weights), strict=True):
            matrix[b, o, s] += v
    return matrix


def make_tokens(
    batch: int, n: int, *, seed: int = 0, protected: tuple[int, ...] = ()
) -> tr.VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.zeros(n, dtype=torch.bool)
    flags[list(protected)] = True
    layout = tr.Layout.line(n).protect(flags)
    return tr.VisualTokens(torch.randn(batch, n, 5, generator=generator), layout)


def step(kind: str, k: int) -> tr.Reducer:
    return EveryOther(keep=k) if kind == "merge" else tr.create_strategy("norm-topk", keep=k)


KINDS = ["prune", "merge"]


@given(
    first=st.sampled_from(KINDS),
    second=st.sampled_from(KINDS),
    n=st.integers(4, 20),
    seed=st.integers(0, 100),
    data=st.data(),
)
def test_then_is_one_after_the_other(
    first: str, second: str, n: int, seed: int, data: st.DataObject
) -> None:
    m = data.draw(st.integers(2, n - 1))
    k = data.draw(st.integers(1, m - 1))
    tokens = make_tokens(1, n, seed=seed)
    one = step(first, m)(tokens)
    (middle,) = one.tokens(tokens)
    two = step(second, k)(middle)
    both = one.then(two)
    assert both.positions.tolist() == one.positions.gather(1, two.positions).tolist()
    assert torch.equal(both.features, two.features)
    extra = torch.randn(1, n, 3, 2)
    assert torch.allclose(both.apply(extra), two.apply(one.apply(extra)), atol=1e-5)
    product = dense(two.weights, two) @ dense(one.weights, one)
    assert torch.allclose(dense(both.weights, both), product, atol=1e-5)
    for source, output in enumerate(both.assignment[0].tolist()):
        between = int(one.assignment[0, source])
        assert output == (-1 if between < 0 else int(two.assignment[0, between]))
    assert both.group_sizes().sum() <= n


@pytest.mark.parametrize("kind", KINDS)
def test_apply_reduces_any_tensor_like_the_features(kind: str) -> None:
    tokens = make_tokens(3, 12)
    result = step(kind, 5)(tokens)
    assert torch.allclose(result.apply(tokens.features), result.features, atol=1e-6)
    numbered = torch.arange(12).repeat(3, 1)
    assert torch.equal(result.apply(numbered), result.positions)
    assert torch.equal(result.apply(numbered % 2 == 0), result.positions % 2 == 0)
    with pytest.raises(ReductionError, match="per-token"):
        result.apply(torch.zeros(3, 11))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [(0,), (3, 7), (11,), tuple(range(11))])
def test_protected_tokens_survive_outside_the_budget(kind: str, protected: tuple[int, ...]) -> None:
    tokens = make_tokens(2, 12, protected=protected)
    free = 12 - len(protected)
    k = max(1, free // 3)
    result = step(kind, k)(tokens)
    if k >= free:
        assert result.reason
        return
    assert result.kept == k + len(protected)
    assert bool((result.positions.diff(dim=1) > 0).all())
    for index in protected:
        for b in range(2):
            place = result.positions[b].tolist().index(index)
            assert torch.equal(result.features[b, place], tokens.features[b, index])
            assert int(result.assignment[b, index]) == place
    assert torch.allclose(result.apply(tokens.features), result.features, atol=1e-6)


def test_sizes_count_source_tokens() -> None:
    tokens = make_tokens(2, 12)
    result = EveryOther(keep=4)(tokens)
    assert result.group_sizes().tolist() == [[2.0, 3.0, 3.0, 3.0]] * 2
    weighted = result.group_sizes(torch.full((2, 12), 2.0))
    assert weighted.tolist() == [[4.0, 6.0, 6.0, 6.0]] * 2


def test_sizes_weigh_means() -> None:
    features = torch.tensor([[[0.0], [3.0], [9.0]]])
    tokens = tr.VisualTokens(features, tr.Layout.line(3), sizes=torch.tensor([[1.0, 2.0, 1.0]]))
    result = tr.Reduction.from_groups(tokens, torch.tensor([[0, 0, 1]]), 2)
    assert result.features.flatten().tolist() == pytest.approx([2.0, 9.0])


def test_groups_are_ordered_by_the_place_they_stand_at() -> None:
    tokens = make_tokens(1, 6)
    groups = torch.tensor([[1, 0, 1, 0, -1, 2]])
    positions = torch.tensor([[3, 0, 5]])
    result = tr.Reduction.from_groups(tokens, groups, 3, positions=positions)
    assert result.positions.tolist() == [[0, 3, 5]]
    assert result.assignment.tolist() == [[0, 1, 0, 1, -1, 2]]
    assert torch.allclose(result.features[0, 0], tokens.features[0, [0, 2]].mean(0))


def test_a_mismatched_composition_is_refused() -> None:
    result = step("prune", 4)(make_tokens(1, 12))
    with pytest.raises(ReductionError, match="then"):
        result.then(result)
