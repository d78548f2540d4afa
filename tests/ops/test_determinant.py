"""Greedy determinants: the definition, by determinants of all candidates."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import TIE_TOLERANCE, determinant
from tokenreduce.ops.determinant import SPAN_TOLERANCE, greedy_determinant


def slow(kernel, k):
    """Each time, the first token of the largest det(L[S + i]) / det(L[S])."""
    n = len(kernel)
    own = kernel.diagonal()
    picked = []
    while len(picked) < k:
        gains = {}
        for i in range(n):
            if i in picked:
                continue
            gain = float(own[i])
            if picked:
                block, cross = kernel[picked][:, picked], kernel[picked, i]
                gain -= float(cross @ torch.linalg.pinv(block, hermitian=True) @ cross)
            gains[i] = max(gain, SPAN_TOLERANCE * float(own[i]))
        best = max(gains, key=lambda i: gains[i])
        least = gains[best] - TIE_TOLERANCE * float(own[best])
        picked.append(next(i for i, g in gains.items() if g >= least))
    return picked


def run(vectors, k, ridge=0.0):
    return greedy_determinant(vectors, vectors, k, ridge=ridge).tolist()


@quick
@given(st.integers(2, 12), st.integers(0, 10_000), st.data())
def test_oracle(n, seed, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(2, n, n + 3, generator=generator)
    ridge = data.draw(st.sampled_from([0.0, 1.0]))
    kernel = (vectors @ vectors.mT).double() + ridge * torch.eye(n)
    assert run(vectors, k, ridge) == [slow(one, k) for one in kernel]


@quick
@given(clouds(dtypes=(torch.float32,)), st.data())
def test_rank_deficient(cloud, data):
    n = cloud.shape[1]
    k = data.draw(st.integers(1, n))
    picks = run(cloud, k)
    for item, picked in zip(cloud, picks, strict=True):
        assert len(set(picked)) == k
        # The greedy volume is never lost to numerical noise: as many as the rank are independent.
        rank = min(k, int(torch.linalg.matrix_rank(item.double())))
        chosen = item[picked[:rank]].double()
        assert int(torch.linalg.matrix_rank(chosen)) == rank or rank == 0


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_together_as_one_by_one(ridge):
    # What other devices than the CPU do.
    vectors = torch.randn(3, 40, 20, generator=torch.Generator().manual_seed(1))
    gain = vectors.square().sum(2) + ridge
    picks = determinant._pick_together(vectors, vectors, gain, 15, ridge)
    assert picks.tolist() == run(vectors, 15, ridge)


def test_duplicates_come_last():
    vectors = torch.eye(4).repeat(3, 1)[None]
    assert run(vectors, 6) == [[0, 1, 2, 3, 4, 5]]


def test_rows_ahead_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 150, 60, generator=generator) * torch.rand(2, 150, 1)
    whole = run(vectors, 40)
    for rows in (1, 3, 40, 150):
        monkeypatch.setattr(determinant, "ROWS", rows)
        assert run(vectors, 40) == whole
    kernel = (vectors @ vectors.mT).double()
    assert whole == [slow(one, 40) for one in kernel]


def test_rows_that_nobody_asks_for():
    # Near copies of a few directions: each pick takes what its copies, computed along, would add.
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(9, 30, generator=generator).repeat_interleave(20, dim=0)
    vectors = (base + torch.randn(180, 30, generator=generator) / 50)[None]
    kernel = (vectors @ vectors.mT).double()
    assert run(vectors, 8) == [slow(kernel[0], 8)]


def together(left, right, k):
    return determinant._pick_together(left, right, (left * right).sum(2), k, 0.0)


@pytest.mark.parametrize("pick", [greedy_determinant, together])
def test_far_beyond_the_rank(pick):
    # Long and short tokens in a space of few dimensions: rounding must not grow pick by pick.
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1, 400, 8, generator=generator)
    vectors *= torch.logspace(-6, 0, 400)[None, torch.randperm(400, generator=generator), None]
    picks = pick(vectors, vectors, 390)[0]
    assert len(picks.unique()) == 390
    assert int(torch.linalg.matrix_rank(vectors[0, picks[:8]].double())) == 8
    # The rest by their diagonal entries, of which a share counts: near ones tie.
    own = vectors[0].square().sum(1)
    tie = 2 * TIE_TOLERANCE / SPAN_TOLERANCE * own.max()
    assert bool((own[picks[8:-1]] >= own[picks[9:]] - tie).all())
