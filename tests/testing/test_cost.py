"""Measuring costs: what is counted, and that the checks catch what costs too much."""

import sys
import time
from dataclasses import dataclass

import pytest
import torch

from tokenreduce.testing import CHECKS, run_checks
from tokenreduce.testing.cost import gram, measure_cost, one_thread, peak_growth
from tokenreduce.testing.subject import Problem, Subject
from tokenreduce_strategies.norm_topk import NormTopK

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize("mebibytes", [8, 48])
def test_peak_growth(mebibytes):
    def call():
        # What is given back before the next block is taken does not add up.
        for _ in range(3):
            torch.zeros(mebibytes << 18)

    assert peak_growth(call) / 2**20 == pytest.approx(mebibytes, abs=0.25)


@linux
def test_a_call_that_fails_has_no_peak(capfd):
    assert peak_growth(lambda: 1 / 0) is None


def test_measure_cost():
    subject = Subject.of("norm-topk")
    tokens = subject.image(8, 8, batch=2)
    with one_thread():
        assert torch.get_num_threads() == 1
        cost = measure_cost(NormTopK(keep=4), tokens, rounds=3)
    assert cost.ms > 0
    assert cost.grams == cost.ms / cost.gram_ms
    x = tokens.features[0]
    torch.testing.assert_close(gram(x), x @ x.T)


@dataclass(frozen=True, kw_only=True)
class Slow(NormTopK):
    def score(self, tokens):
        time.sleep(2e-8 * tokens.count**2)
        return super().score(tokens)


@dataclass(frozen=True, kw_only=True)
class Wasteful(NormTopK):
    def score(self, tokens):
        torch.zeros(2, tokens.count, tokens.count)
        return super().score(tokens)


@pytest.fixture
def small(monkeypatch):
    from tokenreduce.testing import checks

    monkeypatch.setattr(checks, "TIMED", (4, 12, 12))
    monkeypatch.setattr(checks, "WEIGHED", (16, 12, 12))
    monkeypatch.setattr(checks, "WIDTH", 64)


def test_slow_and_wasteful_strategies_are_caught(small):
    with pytest.raises(Problem, match="cost class 'score' allows"):
        CHECKS["cost"].run(Subject.of(Slow))
    if sys.platform.startswith("linux"):
        with pytest.raises(Problem, match="matrices of tokens by tokens"):
            CHECKS["memory"].run(Subject.of(Wasteful))
        CHECKS["memory"].run(Subject.of(NormTopK))


def test_costs_are_measured_on_request(small):
    names = {result.check for result in run_checks(NormTopK)}
    assert names.isdisjoint({"cost", "frames", "memory", "matrix-limit"})
    results = {result.check: result for result in run_checks(NormTopK, slow=True)}
    assert results["frames"].outcome == "does not apply"
    assert results["memory"].ok
    assert results["matrix-limit"].ok
