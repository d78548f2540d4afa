"""Choosing by score: oracles in plain Python."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import DTYPES, clouds, quick
from tokenreduce.errors import ReductionError
from tokenreduce.ops import (
    TIE_TOLERANCE,
    farthest_first,
    first_argmax,
    gather_tokens,
    rounds,
    top_k_indices,
    top_k_mask,
    unit_vectors,
)


def tolerance(scores, scale):
    finite = [abs(s) for s in scores if math.isfinite(s)]
    return TIE_TOLERANCE * (max(finite, default=0.0) if scale is None else scale)


def slow_first_argmax(scores, scale=None):
    return next(
        n
        for n, s in enumerate(scores)
        if s >= max(scores) - tolerance(scores, scale) or s == max(scores)
    )


def slow_top_k(scores, k, scale=None):
    if k == 0:
        return []
    threshold = sorted(scores, reverse=True)[k - 1]
    near = tolerance(scores, scale)
    surely = [n for n, s in enumerate(scores) if s > threshold + near]
    tied = [n for n, s in enumerate(scores) if n not in surely and s >= threshold - near]
    return sorted(surely + tied[: k - len(surely)])


@quick
@given(clouds(max_tokens=1, dtypes=DTYPES), st.data())
def test_top_k(cloud, data):
    scores = cloud[:, 0]
    k = data.draw(st.integers(0, scores.shape[1]))
    scale = data.draw(st.sampled_from([None, 1.0, 100.0]))
    got = top_k_indices(scores, k, scale=scale)
    assert got.dtype == torch.long
    expected = [slow_top_k(row, k, scale) for row in scores.double().tolist()]
    assert got.tolist() == expected
    mask = top_k_mask(scores.float(), k, scale=scale)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == expected


@quick
@given(clouds(max_tokens=1, dtypes=DTYPES), st.sampled_from([None, 1.0, 100.0]))
def test_first_argmax(cloud, scale):
    scores = cloud[:, 0]
    expected = [slow_first_argmax(row, scale) for row in scores.float().tolist()]
    assert first_argmax(scores, scale=scale).tolist() == expected


def test_ties_go_to_the_lowest_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0 + 5e-7, -torch.inf]])
    assert first_argmax(scores).tolist() == [1]
    assert top_k_indices(scores, 2).tolist() == [[1, 2]]
    assert top_k_indices(scores, 4).tolist() == [[1, 2, 3, 4]]
    assert top_k_indices(scores, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_tokens_that_are_out_are_taken_last():
    scores = torch.tensor([[-torch.inf, -torch.inf, 0.5, -torch.inf]])
    assert top_k_indices(scores, 1).tolist() == [[2]]
    assert top_k_indices(scores, 2).tolist() == [[0, 2]]
    assert first_argmax(torch.full((1, 3), -torch.inf)).tolist() == [0]


def test_a_scale_for_each_row():
    scores = torch.tensor([[0.0, 1e-4], [0.0, 1e-4]])
    assert first_argmax(scores, scale=torch.tensor([[1.0], [1000.0]])).tolist() == [1, 0]
    assert top_k_indices(scores, 1, scale=torch.tensor([[1.0], [1000.0]])).tolist() == [[1], [0]]


@pytest.mark.parametrize("distinct", [2, 10, 150, 10_000])
@pytest.mark.parametrize("k", [1, 3, 12, 60])
def test_few_of_many(distinct, k):
    generator = torch.Generator().manual_seed(distinct)
    scores = torch.randint(0, distinct, (4, 150), generator=generator) / distinct
    expected = [slow_top_k(row, k, 1.0) for row in scores.double().tolist()]
    assert top_k_indices(scores, k, scale=1.0).tolist() == expected
    assert top_k_indices(scores.reshape(2, 2, 150), k, scale=1.0).flatten(0, 1).tolist() == expected


def test_more_leading_axes():
    scores = torch.rand(2, 3, 7, generator=torch.Generator().manual_seed(0))
    assert top_k_indices(scores, 3)[1, 2].equal(top_k_indices(scores[1], 3)[2])
    assert first_argmax(scores)[1].equal(first_argmax(scores[1]))


def test_nan_scores_are_an_error():
    with pytest.raises(ReductionError, match="NaN"):
        top_k_indices(torch.tensor([[torch.nan, 1.0, torch.nan]]), 2)


def slow_farthest_first(unit, k, first):
    picks = [first]
    while len(picks) < k:
        nearest = [
            -math.inf if i in picks else min(1 - float(unit[i] @ unit[j]) for j in picks)
            for i in range(len(unit))
        ]
        picks.append(slow_first_argmax(nearest, 1.0))
    return picks


@quick
@given(clouds(), st.data())
def test_farthest_first(cloud, data):
    n = cloud.shape[1]
    k, first = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    unit = unit_vectors(cloud)
    exact = torch.nn.functional.normalize(cloud.double(), dim=-1)
    expected = [slow_farthest_first(item, k, first) for item in exact]
    start = torch.full((len(unit),), first)
    gram = unit @ unit.transpose(1, 2)
    for candidates in (2, rounds.CANDIDATES):
        with patch.object(rounds, "CANDIDATES", candidates):
            assert farthest_first(unit, k, first=start).tolist() == expected
    assert farthest_first(unit, k, first=start, gram=gram).tolist() == expected


def test_noise_among_duplicates_is_no_distance():
    unit = unit_vectors(torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)))
    unit = unit.expand(1, 6, 64)
    noise = 2e-8 * torch.tensor([[0.0, 1, 0, 2, 0, 3]])
    gram = (unit @ unit.transpose(1, 2)) - noise[:, None] - noise[..., None]
    picks = farthest_first(unit, 4, first=torch.tensor([2]), gram=gram)
    assert picks.tolist() == [[2, 0, 1, 3]]


@quick
@given(clouds(), st.data())
def test_gather_tokens(cloud, data):
    batch, n, _ = cloud.shape
    index = data.draw(
        st.lists(
            st.lists(st.integers(0, n - 1), min_size=2, max_size=2), min_size=batch, max_size=batch
        )
    )
    for tensor in (cloud, cloud[..., 0], cloud[..., None], torch.arange(n).expand(batch, n)):
        got = gather_tokens(tensor, torch.tensor(index))
        for b in range(batch):
            for m in range(2):
                assert got[b, m].equal(tensor[b, index[b][m]])


@quick
@given(clouds())
def test_unit_vectors(cloud):
    unit = unit_vectors(cloud)
    assert unit.dtype == torch.float32
    for row, source in zip(unit.flatten(0, 1), cloud.double().flatten(0, 1), strict=True):
        norm = math.sqrt(sum(float(x) ** 2 for x in source))
        expected = source / norm if norm > 0 else source
        torch.testing.assert_close(row.double(), expected, rtol=1e-5, atol=1e-6)
