"""DivPrune: an oracle in the notation of the paper."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies import divprune
from tokenreduce_strategies.divprune import DivPrune

TIE = 2.5e-7


def first_of_the_largest(values):
    return next(i for i, v in values.items() if v >= max(values.values()) - TIE)


def slow(x, k):
    """Solve the max-min diversity problem greedily, by definition."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    n = len(x)
    d = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
    picked = [first_of_the_largest({i: min(d[i][j] for j in range(n) if j != i) for i in range(n)})]
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked]
        picked.append(first_of_the_largest({i: min(d[i][j] for j in picked) for i in rest}))
    return picked


def grid_tokens(cloud):
    return VisualTokens.from_grid(cloud, (1, cloud.shape[1]))


@quick
@given(clouds(min_tokens=2), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    picks = DivPrune(keep=k).select(grid_tokens(cloud), k)
    assert picks.tolist() == [slow(item, k) for item in cloud]


def test_without_a_gram_matrix(monkeypatch):
    tokens = grid_tokens(torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(0)))
    whole = DivPrune(keep=12).select(tokens, 12)
    monkeypatch.setattr(divprune, "GRAM_LIMIT", 69)
    assert DivPrune(keep=12).select(tokens, 12).equal(whole)
    # One item at a time.
    monkeypatch.setattr(divprune, "GRAM_LIMIT", 70)
    assert DivPrune(keep=12).select(tokens, 12).equal(whole)


def test_duplicate_frames_count_once():
    frame = torch.randn(1, 30, 32, generator=torch.Generator().manual_seed(0))
    clip = VisualTokens.from_grid(frame.repeat(1, 4, 1), (4, 5, 6))
    kept = DivPrune(keep=30)(clip).positions[0]
    assert kept.tolist() == list(range(30))
