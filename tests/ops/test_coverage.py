"""Greedy coverage: the plain algorithm, every token for every pick."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import TIE_TOLERANCE, coverage
from tokenreduce.ops.coverage import greedy_coverage


def slow(c, w, b, k):
    """``c[j][i]``: how much token j covers place i."""
    n, places = c.shape
    picked, covered = [], [0.0] * places
    while len(picked) < k:
        score = {
            j: float(w[j]) * sum(max(0.0, float(c[j, i]) - covered[i]) for i in range(places))
            + float(b[j])
            for j in range(n)
            if j not in picked
        }
        best = max(score, key=lambda j: score[j])
        tie = TIE_TOLERANCE * max(score[best], min(1.0, float(w[best])))
        picked.append(next(j for j, s in score.items() if s >= score[best] - tie))
        covered = [max(covered[i], float(c[picked[-1], i])) for i in range(places)]
    return picked


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.integers(1, 3), st.data())
def test_oracle(cloud, chunk, data):
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    weight = torch.randint(0, 5, (batch, n), generator=generator) / 4
    bonus = torch.randint(0, 3, (batch, n), generator=generator) / 2
    bonus = data.draw(st.sampled_from([None, bonus]))
    unit = torch.nn.functional.normalize(cloud, dim=-1)
    usual = coverage.CHUNK, coverage.LISTED, coverage.LONGER
    coverage.CHUNK, coverage.LISTED, coverage.LONGER = chunk, 2 * chunk, 2
    try:
        cover = unit @ unit.mT
        picks = greedy_coverage(cover, k, weight=weight, bonus=bonus)
        plus = torch.zeros_like(weight) if bonus is None else bonus
        first = cover.clamp(min=0).sum(2) * weight + plus
        assert coverage._pick_together(cover, first, k, weight, plus).equal(picks)
    finally:
        coverage.CHUNK, coverage.LISTED, coverage.LONGER = usual
    for b in range(batch):
        gram = unit[b].double() @ unit[b].double().T
        plus = torch.zeros(n) if bonus is None else bonus[b]
        assert picks[b].tolist() == slow(gram, weight[b], plus, k)


def test_few_are_evaluated_again(monkeypatch):
    unit = torch.nn.functional.normalize(
        torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    refresh, evaluated = coverage._refresh, []

    def counting(score, *given):
        before = score.copy()
        refresh(score, *given)
        evaluated.append(int((score != before).sum()))

    monkeypatch.setattr(coverage, "_refresh", counting)
    greedy_coverage(unit @ unit.mT, 50, weight=torch.ones(1, 400))
    assert len(evaluated) == 49
    assert 49 <= sum(evaluated) < 0.25 * 50 * 400


def test_small_weights_are_told_apart():
    # Tokens unlike each other, of which each adds its weight: the next ones only tell by rank.
    unit, weight = torch.eye(40)[None], torch.logspace(0, -12, 40)[None]
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    picks = greedy_coverage(unit @ unit.mT, 40, weight=weight[:, shuffled])
    assert shuffled[picks[0]].tolist() == list(range(40))
