"""Quotas against counting by hand."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import quick
from tokenreduce.errors import ReductionError
from tokenreduce.ops.quotas import apportion, kept_indices, top_mask


@quick
@given(st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1), st.data())
def test_top_mask(rows, data):
    counts = [data.draw(st.integers(0, 5)) for _ in rows]
    mask = top_mask(torch.tensor(rows).float(), torch.tensor(counts))
    for row, count, kept in zip(rows, counts, mask.tolist(), strict=True):
        best = sorted(range(5), key=lambda i: (-row[i], i))[:count]
        assert [i for i in range(5) if kept[i]] == sorted(best)


def test_top_mask_ignores_noise():
    scores = torch.tensor([[1.0, 1 + 1e-7, 1 - 1e-7, 0.5]])
    assert top_mask(scores, torch.tensor([2])).tolist() == [[True, True, False, False]]


def slow(weights, total, caps, least):
    """Fill rows in proportion, again and again, as rows become full; then largest remainder."""
    rows = range(len(weights))
    start = [min(least, cap) for cap in caps]
    if sum(start) > total:
        start = [0 for _ in rows]
    room, rest = [caps[t] - start[t] for t in rows], total - sum(start)
    if not any(weights):
        weights = [1 for _ in rows]
    mean = Fraction(sum(weights), len(weights))
    weights = [max(Fraction(w) / mean, Fraction(1, 10**6)) for w in weights]
    full = set()
    while True:
        others = [t for t in rows if t not in full]
        left = rest - sum(room[t] for t in full)
        share = {t: left * weights[t] / sum(weights[o] for o in others) for t in others}
        more = {t for t in others if share[t] > room[t]}
        if not more:
            break
        full |= more
    share |= {t: Fraction(room[t]) for t in full}
    whole = {t: int(share[t] + Fraction(1, 10**4)) for t in rows}
    order = sorted(
        (t for t in rows if whole[t] < room[t]), key=lambda t: (-round(share[t] - whole[t], 6), t)
    )
    for t in order[: rest - sum(whole.values())]:
        whole[t] += 1
    return [start[t] + whole[t] for t in rows]


@quick
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1), st.data())
def test_apportion(rows, data):
    weights, caps = (list(column) for column in zip(*rows, strict=True))
    total = data.draw(st.integers(0, sum(caps)))
    least = data.draw(st.integers(0, 2))
    shares = apportion(torch.tensor(weights).float(), total, torch.tensor(caps), least=least)
    assert shares.tolist() == slow(weights, total, caps, least)


def test_apportion_with_one_cap():
    weights = torch.tensor([[8.0, 1, 1], [1, 1, 1]])
    assert apportion(weights, 10, 6).tolist() == [[6, 2, 2], [4, 3, 3]]
    assert apportion(weights, 2, 6, least=1).tolist() == [[2, 0, 0], [1, 1, 0]]


def test_apportion_ignores_noise():
    noise = torch.tensor([[0.0, 3e-8, -3e-8, 1e-8]])
    assert apportion(1 + noise, 10, 8).tolist() == [[3, 3, 2, 2]]
    assert apportion(1 + noise, 12, 8).tolist() == [[3, 3, 3, 3]]


def test_kept_indices():
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert kept_indices(mask).tolist() == [[0, 2], [1, 2]]
    with pytest.raises(ReductionError, match=r"\[1, 2\]"):
        kept_indices(torch.tensor([[True, False, False], [True, True, False]]))
