"""What careless authors get wrong, each caught by exactly the check that is meant to."""

import os
import random
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from support.defects import Defects
from tokenreduce import Reduction, VisualTokens
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.ops import MergeWeights
from tokenreduce.plugins import installed
from tokenreduce.reducer import Merger, Reducer, Scorer, Selector
from tokenreduce.testing import CHECKS, run_checks
from tokenreduce.testing.elsewhere import Mixed, moved, pretending
from tokenreduce_strategies.norm_topk import NormTopK

BROKEN = Defects(dataclass(frozen=True, kw_only=True))
caught_by = BROKEN.caught_by


def norms(tokens):
    return tokens.features.float().norm(dim=-1)


def runs(tokens, k):
    """Groups of neighbours, ``(B, N)``."""
    count = torch.arange(tokens.count, device=tokens.features.device)
    return (count * k // tokens.count).expand(tokens.batch, -1)


def registered_as(**fields):
    """A mixin whose record says so."""

    class Recorded:
        @property
        def record(self):
            target = f"{type(self).__module__}:{type(self).__qualname__}"
            return StrategyRecord(name=type(self).__name__, target=target, summary="", **fields)

    return Recorded


class Good(Scorer):
    def score(self, tokens):
        return norms(tokens)


class GoodMerger(Merger):
    def assign(self, tokens, k):
        return runs(tokens, k)


@caught_by("weights")
class AssignsToTheNextOutput(GoodMerger):
    """What is no output of its own is said to have flowed elsewhere."""

    def reduce(self, tokens):
        result = super().reduce(tokens)
        moved = (result.assignment + 1) % result.kept
        own = torch.zeros_like(moved, dtype=torch.bool).scatter(1, result.positions, True)
        return replace(result, assignment=torch.where(own, result.assignment, moved))


@caught_by("weights")
class SaysItDroppedWhatItMerged(GoodMerger):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        own = torch.zeros_like(result.assignment, dtype=torch.bool)
        own = own.scatter(1, result.positions, True)
        return replace(result, assignment=torch.where(own, result.assignment, -1))


@caught_by("weights")
class AssignsWithoutMerging(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, assignment=result.assignment.clamp(min=0))


@caught_by("weights")
class SubtractsTokens(registered_as(kind="merge"), Reducer):
    def reduce(self, tokens):
        kept = NormTopK(keep=self.count(tokens.count)).reduce(tokens)
        output = torch.arange(kept.kept).expand(tokens.batch, -1)
        weights = MergeWeights(
            torch.cat([output, output[:, :1]], 1),
            torch.cat([kept.positions, kept.positions[:, :1]], 1),
            torch.cat([torch.full(output.shape, 2.0), torch.full((tokens.batch, 1), -1.0)], 1),
        )
        mixed = replace(kept, weights=weights)
        return replace(mixed, features=mixed.apply(tokens.features))


@caught_by("features")
class WeighsOtherTokens(GoodMerger):
    """The weights are those of tokens one further."""

    def reduce(self, tokens):
        result = super().reduce(tokens)
        source = (result.weights.source + 1) % tokens.count
        return replace(result, weights=replace_source(result.weights, source))


def replace_source(weights, source):
    return MergeWeights(weights.output, source, weights.value)


@caught_by("assignment")
class StandsAtTheLastMember(GoodMerger):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, positions=(result.positions + 1).clamp(max=tokens.count - 1))


@caught_by("ties")
class SortsAndReverses(Selector):
    """An ascending sort turned round: of equal tokens the last come first."""

    def select(self, tokens, k):
        return norms(tokens).sort(dim=1, stable=True).indices.flip(1)[:, :k]


@caught_by("precision")
class ScoresInHalf(Scorer):
    def score(self, tokens):
        return tokens.features.square().sum(-1)


@caught_by("precision")
class AveragesInHalf(Scorer):
    """Rounded scores are ties that are none."""

    def score(self, tokens):
        return tokens.features.abs().mean(-1)


@caught_by("tiny")
class LooksAtThreeNeighbours(Selector):
    """Needs more tokens than there may be."""

    def select(self, tokens, k):
        score = norms(tokens)
        if tokens.count > 2:
            score = score + 1e-3 * score.topk(min(5, tokens.count + 1)).values[:, :1]
        return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


@caught_by("tiny")
class KeepsAtLeastTwo(Reducer):
    """Off by one where there are three tokens or four."""

    def reduce(self, tokens):
        k = self.count(tokens.count)
        k = 2 if k == 1 and tokens.count in (3, 4) else k
        order = norms(tokens).sort(dim=1, descending=True, stable=True).indices
        return Reduction.from_kept(tokens, order[:, :k])


@caught_by("bad-budget")
class ForgetsItsParent(Good):
    def __post_init__(self):
        pass


@caught_by("yaml", "bad-budget")
class KeepsALittleMore(Good):
    """An option that changes each time that the instance is copied."""

    scale: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "scale", self.scale * 2)


@caught_by("yaml")
class NestsItsOptions(Good):
    """YAML gives lists, which are no tuples further down."""

    pairs: tuple = ((1, 2), (3, 4))


@caught_by("globals")
class TurnsGradientsOff(Good):
    def score(self, tokens):
        torch.set_grad_enabled(False)
        return norms(tokens)


@caught_by("globals")
class SetsTheEnvironment(Good):
    def score(self, tokens):
        os.environ["TOKENREDUCE_TEST_LEFT"] = str(time.perf_counter())
        return norms(tokens)


@caught_by("determinism")
class PythonDice(Good):
    def score(self, tokens):
        return norms(tokens) + random.random() * torch.arange(tokens.count)


@caught_by("determinism")
class SeedsNumPy(Good):
    def score(self, tokens):
        np.random.seed(0)
        return norms(tokens) + torch.from_numpy(np.random.rand(tokens.count)).float()


@caught_by("determinism")
class SeedsTorch(Good):
    def score(self, tokens):
        torch.manual_seed(0)
        return torch.rand(tokens.features.shape[:2])


@caught_by("determinism")
class RemembersByShape(Good):
    """A cache of scores that looks at shapes alone."""

    def score(self, tokens):
        seen = vars(self).setdefault("seen", {})
        return seen.setdefault(tuple(tokens.features.shape), norms(tokens).detach())


@caught_by("device")
class LivesOnTheCPU(Good):
    def score(self, tokens):
        return norms(tokens) + torch.arange(tokens.count, device="cpu") * 1e-9


@caught_by("scaling")
class ComparesAllPairs(Good):
    """Says that it passes over the features once."""

    def score(self, tokens):
        x = tokens.features.float()
        return (x @ x.transpose(1, 2)).mean(-1)


@caught_by("scaling")
class BroadcastsPairs(registered_as(cost="graph"), Good):
    def score(self, tokens):
        x = tokens.features.float()
        return (x[:, :, None] - x[:, None]).norm(dim=-1).mean(-1)


@caught_by("scaling")
class LoopsOverTokens(Good):
    def score(self, tokens):
        columns = [tokens.features[:, i].float().norm(dim=-1) for i in range(tokens.count)]
        return torch.stack(columns, dim=1)


@caught_by("signals")
class DeclaresTooMuch(registered_as(needs=("keys",)), Good):
    """The signal would be captured for nothing."""


@caught_by("compile")
class BranchesOnData(registered_as(compiles=True), Good):
    def score(self, tokens):
        score = norms(tokens)
        return score if float(score.detach().sum()) > 0 else -score


@caught_by("layouts")
class CountsOnAFullClip(Good):
    """Takes the number of tokens for that of frames times that of places."""

    def score(self, tokens):
        t, h, w = (int(side) + 1 for side in tokens.coords[:, 1:].amax(0))
        blocks = int(tokens.coords[:, 0].amax()) + 1
        if blocks == 1:
            norms(tokens).reshape(tokens.batch, t, h * w)
        return norms(tokens)


@caught_by("batch-invariance")
class RanksOverTheBatch(Good):
    def score(self, tokens):
        score = norms(tokens)
        return (score - score.mean()) * (score.mean() - score.mean(1, keepdim=True) + 1e-3).sign()


@caught_by("no-mutation")
class ZeroesWhatItDrops(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        tokens.features[result.assignment < 0] = 0
        return result


@caught_by("protected")
class CountsProtectedTokens(Good):
    """The budget includes what must survive."""

    def __call__(self, tokens):
        guarded = tokens.layout.protected_count
        fewer = (self.keep or 0) - guarded
        if guarded == 0 or fewer < 1:
            return super().__call__(tokens)
        return self.with_budget(keep=fewer).__call__(tokens)


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_exactly_the_right_check(name):
    strategy, expected = BROKEN[name]
    results = run_checks(strategy)
    failed = {result.check: result.detail for result in results if result.outcome == "failed"}
    assert set(failed) == expected, failed
    assert torch.is_grad_enabled()
    os.environ.pop("TOKENREDUCE_TEST_LEFT", None)


@dataclass(frozen=True, kw_only=True)
class Compiles(registered_as(compiles=True), Good):
    pass


@dataclass(frozen=True, kw_only=True)
class Merges(GoodMerger):
    pass


@pytest.mark.parametrize("strategy", [Compiles, Merges])
def test_sound_strategies_pass(strategy):
    assert [r for r in run_checks(strategy) if not r.ok] == []


@dataclass(frozen=True, kw_only=True)
class Undocumented(Scorer):
    power: float = 2.0

    def score(self, tokens):
        return norms(tokens) ** self.power + torch.zeros(tokens.count)


@dataclass(frozen=True, kw_only=True)
class HalfDocumented(Undocumented):
    """Keeps what is large."""

    exponent: float = 1.0

    def score(self, tokens):
        return norms(tokens)


@pytest.fixture
def register():
    added = []
    registry = installed().strategies

    def add(cls, **fields):
        target = f"{cls.__module__}:{cls.__qualname__}"
        record = registry.make_record(name=cls.__name__.lower(), target=target, **fields)
        registry.add(record)
        added.append(record.name)
        return record.name

    yield add
    for name in added:
        registry.remove(name)


def test_what_is_registered_is_documented_and_ready_for_a_gpu(register):
    results = {r.check: r for r in run_checks(register(Undocumented, summary="Large ones."))}
    assert "no docstring" in results["documented"].detail
    assert "device=tokens.features.device" in results["device"].detail
    results = {r.check: r for r in run_checks(register(HalfDocumented, summary="Large ones."))}
    assert "does not explain power, exponent" in results["documented"].detail
    assert results["device"].ok
    assert not run_checks(Undocumented)[-1].detail.startswith("has no docstring")


def test_expected_failures_of_every_kind_are_strict():
    results = {r.check: r for r in run_checks(BROKEN["SortsAndReverses"][0], {"ties": "as it is"})}
    assert results["ties"].outcome == "expected failure"
    results = {r.check: r for r in run_checks(NormTopK, {"ties": "as it is"})}
    assert results["ties"].outcome == "failed"


def test_the_pretended_device():
    with pretending() as device:
        x = moved(torch.arange(6.0).reshape(2, 3))
        assert x.device == device
        assert x.sum().item() == 15
        assert (x + torch.ones(3, device=device)).tolist() == [[1, 2, 3], [4, 5, 6]]
        assert x[:, torch.tensor([2, 0])].tolist() == [[2, 0], [5, 3]]
        assert (x + torch.tensor(1.0))[0, 0] == 1
        assert x.cpu().device.type == "cpu"
        assert x.new_tensor([1, 2]).device == device
        with pytest.raises(Mixed):
            x + torch.ones(3)
        with pytest.raises(Mixed):
            torch.cat([x, torch.ones(1, 3)])
    with pretending(by_default=True) as device:
        assert (x + torch.ones(3)).device == device
        with pytest.raises(Mixed):
            x + torch.ones(3, device="cpu")


def test_checks_of_behaviour_build_upon_the_contract():
    names = ("weights", "ties", "precision", "tiny", "globals", "device", "scaling", "compile")
    for name in names:
        assert "no-mutation" in CHECKS[name].after


def test_tokens_of_the_pretended_device_are_reduced():
    with pretending() as device, torch.no_grad():
        tokens = VisualTokens.from_grid(moved(torch.randn(2, 12, 4)), (3, 4))
        assert NormTopK(keep=3)(tokens).positions.device == device
