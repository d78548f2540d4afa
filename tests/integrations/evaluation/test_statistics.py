"""The statistics against slow oracles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from tokenreduce_integrations.evaluation.statistics import (
    Bootstrap,
    Correct,
    holm,
    mcnemar,
    sign_flips,
)


def bootstrap_of(rows: Sequence[Sequence[str]], **options: int) -> Bootstrap:
    """The statistics of pictures with questions of the given types."""
    groups = [index for index, row in enumerate(rows) for _ in row]
    return Bootstrap(groups, [kind for row in rows for kind in row], **options)


ROWS = (["color", "shape"], ["color"], ["shape", "shape", "count"], ["count", "color"], ["color"])
CORRECT = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1], bool)
OTHER = np.array([0, 0, 1, 0, 0, 1, 1, 1, 0], bool)


def slow_macro(rows: Sequence[Sequence[str]], correct: Correct, chosen: Sequence[int]) -> float:
    """Macro accuracy over the chosen scenes, counted question by question."""
    starts = np.cumsum([0, *map(len, rows)])
    right: dict[str, list[bool]] = {}
    for scene in chosen:
        for offset, kind in enumerate(rows[scene]):
            right.setdefault(kind, []).append(correct[starts[scene] + offset])
    return float(np.mean([np.mean(values) for values in right.values()]))


def test_macro_weighs_question_types_alike() -> None:
    bootstrap = bootstrap_of(ROWS, resamples=10)
    assert bootstrap.by_type(CORRECT) == {"color": 1.0, "shape": 1 / 3, "count": 1 / 2}
    value = bootstrap.macro(CORRECT).value
    assert value == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert value == pytest.approx(slow_macro(ROWS, CORRECT, range(5)))


def test_intervals_equal_those_of_a_slow_bootstrap() -> None:
    resamples, seed = 300, 4
    bootstrap = bootstrap_of(ROWS, resamples=resamples, seed=seed)
    rng = np.random.default_rng(seed)
    macros, differences = [], []
    for counts in rng.multinomial(5, [0.2] * 5, size=resamples):
        chosen = np.repeat(np.arange(5), counts)
        mine, other = (slow_macro(ROWS, answers, chosen) for answers in (CORRECT, OTHER))
        macros.append(mine)
        differences.append(mine - other)
    for estimate, values in (
        (bootstrap.macro(CORRECT), macros),
        (bootstrap.difference(CORRECT, OTHER), differences),
    ):
        assert (estimate.low, estimate.high) == pytest.approx(
            tuple(np.quantile(values, [0.025, 0.975]))
        )
    assert bootstrap.share(CORRECT, CORRECT).low == 1
    assert bootstrap.share(CORRECT, np.zeros(9, bool)).high == 0
    assert bootstrap.difference(CORRECT, CORRECT).high == 0


def test_intervals_cover_as_often_as_they_claim() -> None:
    """Scenes with a common difficulty: resampling questions would give too narrow intervals."""
    rng = np.random.default_rng(0)
    rows = [["color"] * 4] * 150
    covered = 0
    for _ in range(200):
        difficulty = rng.choice([0.1, 0.9], size=150)
        correct = (rng.random((150, 4)) < difficulty[:, None]).ravel()
        estimate = bootstrap_of(rows, resamples=200).macro(correct)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.9 <= covered / 200 <= 0.99


def test_resamples_are_seeded() -> None:
    correct = np.tile(CORRECT, 20)
    first, same, other = (bootstrap_of(ROWS * 20, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first.macro(correct) == same.macro(correct)
    assert first.macro(correct) != other.macro(correct)


def test_the_mean_over_all_questions() -> None:
    bootstrap = bootstrap_of(ROWS, resamples=400)
    micro = bootstrap.micro(CORRECT)
    assert micro.value == pytest.approx(CORRECT.mean())
    assert micro.low < micro.value < micro.high
    assert not bootstrap.independent
    assert bootstrap_of([["color"], ["shape"]], resamples=1).independent


def test_shares_of_a_difference_sum_to_it() -> None:
    bootstrap = bootstrap_of(ROWS, resamples=1)
    shares = bootstrap.differences(CORRECT, OTHER)
    assert shares.shape == (5,)
    assert shares.sum() == pytest.approx(bootstrap.difference(CORRECT, OTHER).value)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 9), (40, 61), (700, 640)])
def test_mcnemar_is_a_binomial_test(wins: int, losses: int) -> None:
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(wins, losses) == pytest.approx(expected)


def test_sign_flips_equal_all_permutations() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(0.4, 1, size=(3, 10))
    signs = np.array(list(itertools.product([1, -1], repeat=10)))
    exact = [(np.abs(signs @ d) >= abs(d.sum()) - 1e-12).mean() for d in differences]
    assert sign_flips(differences, flips=40_000) == pytest.approx(exact, abs=0.01)


def test_sign_flips_reject_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(1)
    values = sign_flips(rng.choice([-1.0, 0.0, 1.0], size=(400, 30)), flips=999)
    assert (values <= 0.05).mean() <= 0.08


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
