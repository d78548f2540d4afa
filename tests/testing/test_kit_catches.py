"""Strategies broken on purpose, each caught by exactly the check that is meant to."""

import random
from dataclasses import dataclass, field, replace

import pytest
import torch

from support.defects import Defects
from tokenreduce import Reduction, VisualTokens
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.errors import BudgetError, RegistrationError, UnknownName
from tokenreduce.ops import MergeWeights
from tokenreduce.ops.limits import require_matrix
from tokenreduce.reducer import Grouping, Merger, Reducer, Scorer, Selector
from tokenreduce.testing import CHECKS, CheckFailed, parametrize_checks, run_checks
from tokenreduce.testing.check import Problem
from tokenreduce.testing.subject import Subject
from tokenreduce.wrappers import PerFrame

BROKEN = Defects(dataclass(frozen=True, kw_only=True))
caught_by = BROKEN.caught_by


def norms(tokens):
    return tokens.features.float().norm(dim=-1)


class Good(Scorer):
    def score(self, tokens):
        return norms(tokens)


def registered_as(**fields):
    """A mixin whose record says so."""

    class Recorded:
        @property
        def record(self):
            target = f"{type(self).__module__}:{type(self).__qualname__}"
            return StrategyRecord(name=type(self).__name__, target=target, summary="", **fields)

    return Recorded


@caught_by("shapes")
class OneDimensionalAssignment(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, assignment=result.assignment[:, :-1])


@caught_by("shapes")
class ScoresOfOneItem(Good):
    def score(self, tokens):
        return norms(tokens)[:1]


@caught_by("shapes")
class SmallIntegers(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, positions=result.positions.int())


@caught_by("budget")
class OneTooMany(Good):
    def count(self, tokens):
        return super().count(tokens) + 1

    def reduce(self, tokens):
        k = min(self.count(tokens.count), tokens.count)
        return Reduction.from_kept(tokens, norms(tokens).topk(k).indices)


@caught_by("budget")
class RoundsItsOwnWay(Good):
    def reduce(self, tokens):
        k = self.keep or max(1, int(tokens.count * float(self.budget._ratio)))
        return Reduction.from_kept(tokens, norms(tokens).topk(k).indices)


@caught_by("budget")
class AboveALayoutBudget(registered_as(count="layout"), Good):
    def reduce(self, tokens):
        k = min(tokens.count, self.count(tokens.count) + tokens.count % 2)
        return Reduction.from_kept(tokens, norms(tokens).topk(k).indices)


@caught_by("budget")
class CountsByContent(registered_as(count="layout"), Good):
    def reduce(self, tokens):
        k = self.count(tokens.count)
        k = max(1, k - int((norms(tokens)[0] > norms(tokens)[0].mean()).sum()) % 5)
        return Reduction.from_kept(tokens, norms(tokens).topk(k).indices)


@caught_by("positions")
class InOrderOfScore(Good):
    def reduce(self, tokens):
        kept = norms(tokens).topk(self.count(tokens.count)).indices
        ranks = torch.arange(kept.shape[1]).expand_as(kept)
        lost = kept.new_full((tokens.batch, tokens.count), -1)
        return Reduction(
            features=tokens.features[torch.arange(tokens.batch)[:, None], kept],
            positions=kept,
            assignment=lost.scatter(1, kept, ranks),
        )


@caught_by("positions")
class PicksTwice(Selector):
    def select(self, tokens, k):
        return torch.zeros(tokens.batch, k, dtype=torch.long)


@caught_by("positions")
class EmptyGroup(Merger):
    def assign(self, tokens, k):
        groups = torch.arange(tokens.count) % max(1, k - 1)
        return groups.expand(tokens.batch, -1)


@caught_by("assignment")
class AssignsToNobody(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, assignment=result.assignment + 1)


@caught_by("assignment")
class StandsElsewhere(Merger):
    def assign(self, tokens, k):
        groups = (torch.arange(tokens.count) % k).expand(tokens.batch, -1)
        positions = torch.arange(tokens.count - k, tokens.count).expand(tokens.batch, -1)
        return Grouping(groups, positions) if tokens.count % k else groups


@caught_by("features")
class ScalesWhatItKeeps(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, features=result.features * 1.01)


@caught_by("kind")
class PrunesByMerging(registered_as(kind="prune"), Merger):
    def assign(self, tokens, k):
        return (torch.arange(tokens.count) % k).expand(tokens.batch, -1)


@caught_by("keep-all")
class NeverKeepsAll(Good):
    def __call__(self, tokens):
        result = super().__call__(tokens)
        return replace(result, features=result.features.clone(), reason="")


@caught_by("determinism")
class GlobalDice(Good):
    def score(self, tokens):
        return torch.rand(tokens.features.shape[:2])


@caught_by("signals")
class PeeksAtSignals(Good):
    def score(self, tokens):
        return tokens.signals.get("class_attention", norms(tokens))


@caught_by("no-mutation")
class DoublesSizes(Good):
    def score(self, tokens):
        tokens.sizes.mul_(2)
        return norms(tokens)


DICE = random.Random(0)


@caught_by("determinism")
class PrivateDice(Good):
    def score(self, tokens):
        return norms(tokens) + DICE.random() * torch.arange(tokens.count)


@caught_by("determinism")
class CountsItsCalls(Good):
    calls: list = field(default_factory=list, compare=False, repr=False, init=False)

    def options(self):
        return {}

    def score(self, tokens):
        self.calls.append(1)
        return norms(tokens).roll(len(self.calls), dims=1)


@caught_by("batch-invariance")
class NormalizesOverTheBatch(Good):
    def score(self, tokens):
        return norms(tokens) * norms(tokens).mean(0)


@caught_by("batch-invariance")
class DrawsByPlaceInTheBatch(Good):
    def score(self, tokens):
        generator = torch.Generator().manual_seed(0)
        return torch.rand(tokens.batch, tokens.count, generator=generator)


@caught_by("layouts")
class ImagesOnly(Good):
    def score(self, tokens):
        _, h, w = tokens.require_grid("ImagesOnly")
        return norms(tokens).reshape(-1, h * w).reshape(tokens.batch, -1)


@caught_by("layouts")
class DropsLaterFrames(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        late = int(tokens.coords[:, 1].max()) > 0
        return result if not late else replace(result, features=result.features.flip(1))


@caught_by("grid")
class NeedsNoGrid(registered_as(needs_grid=True), Good):
    pass


@caught_by("protected")
class SeesProtectedTokens(Good):
    def __call__(self, tokens):
        return super().__call__(VisualTokens(tokens.features, tokens.layout.coords))


@caught_by("dtypes")
class AnswersInFloat32(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, features=result.features.float())


@caught_by("dtypes")
class OverflowsInHalf(Merger):
    def assign(self, tokens, k):
        return (torch.arange(tokens.count) % k).expand(tokens.batch, -1)

    def reduce(self, tokens):
        result = super().reduce(tokens)
        if tokens.features.dtype != torch.float16:
            return result
        return replace(result, features=result.features * 1e4 * 1e4)


@caught_by("no-mutation")
class NormalizesInPlace(Merger):
    def assign(self, tokens, k):
        groups = (torch.arange(tokens.count) % k).expand(tokens.batch, -1)
        if not tokens.features.requires_grad:
            tokens.features.mul_(2)
        return groups


@caught_by("no-mutation")
class WritesItsSignal(registered_as(needs=("class_attention",)), Good):
    def score(self, tokens):
        return tokens.signal("class_attention").mul_(2)


@caught_by("gradients")
class CutsTheGraph(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, features=result.features.detach())


@caught_by("gradients")
class SharpensWithoutGradient(Merger):
    def assign(self, tokens, k):
        return (torch.arange(tokens.count) % k).expand(tokens.batch, -1)

    def reduce(self, tokens):
        result = super().reduce(tokens)
        first = result.features[:, :1].detach()
        return replace(result, features=torch.cat([first, result.features[:, 1:]], dim=1))


@caught_by("non-finite")
class RepairsNaN(Good):
    def __call__(self, tokens):
        clean = tokens.features.nan_to_num(0.0, 0.0, 0.0)
        if clean.equal(tokens.features):
            return super().__call__(tokens)
        return super().__call__(VisualTokens(clean, tokens.layout))


@caught_by("non-finite")
class LooksAtNothing(registered_as(reads_features=False), Good):
    def _require_finite(self, features):
        pass

    def score(self, tokens):
        return torch.arange(tokens.count, dtype=torch.float32).expand(tokens.batch, -1)


@caught_by("unread-features")
class ReadsThemAfterAll(registered_as(reads_features=False), Good):
    pass


@caught_by("degenerate")
class DividesBySpread(Merger):
    def assign(self, tokens, k):
        return (torch.arange(tokens.count) % k).expand(tokens.batch, -1)

    def reduce(self, tokens):
        result = super().reduce(tokens)
        spread = tokens.features.std(dim=(1, 2), keepdim=True)
        return replace(result, features=result.features * (spread / spread))


@caught_by("degenerate")
class ScoresNaN(Good):
    def score(self, tokens):
        return norms(tokens) / norms(tokens).amax(1, keepdim=True)


@caught_by("degenerate")
class NeedsTwoRows(Good):
    def score(self, tokens):
        if tokens.count == 20:
            raise IndexError("no second frame")
        return norms(tokens)


@caught_by("non-contiguous")
class ViewsItsInput(Good):
    def score(self, tokens):
        return (
            tokens.features.view(-1, tokens.features.shape[-1]).norm(dim=-1).view(tokens.batch, -1)
        )


@caught_by("signals")
class ReadsWhatItDoesNotDeclare(Good):
    def score(self, tokens):
        return tokens.signal("class_attention")


@caught_by("signals")
class DoesWithoutItsSignal(registered_as(needs=("class_attention",)), Good):
    def __call__(self, tokens):
        bare = VisualTokens(
            tokens.features,
            tokens.layout,
            signals={"class_attention": norms(tokens).softmax(-1)},
        )
        return super().__call__(bare)


def is_clip(tokens):
    return tokens.grid is not None and tokens.grid[0] > 1


@caught_by("layouts")
class ComparesClipsOfABatch(Good):
    def score(self, tokens):
        usual = tokens.features.float().mean(0, keepdim=True) if is_clip(tokens) else 0
        return (tokens.features.float() - usual).norm(dim=-1)


@caught_by("everywhere")
class WritesIntoClips(Good):
    def score(self, tokens):
        if is_clip(tokens):
            tokens.sizes.add_(1)
        return norms(tokens)


@caught_by("everywhere")
class WidensClips(Good):
    def reduce(self, tokens):
        result = super().reduce(tokens)
        return replace(result, features=result.features.float()) if is_clip(tokens) else result


@caught_by("everywhere")
class RoundsClips(Good):
    def score(self, tokens):
        half = tokens.features.dtype != torch.float32
        return norms(tokens).round() if half and is_clip(tokens) else norms(tokens)


@caught_by("record")
class AdaptiveByRecordOnly(registered_as(count="adaptive"), Good):
    @property
    def decides_alone(self):
        return True


@caught_by("no-budget")
class DecidesWithoutSaying(Good):
    @property
    def decides_alone(self):
        return True

    def count(self, tokens):
        return self.budget.count(tokens) if self.budget else max(1, tokens // 2)


@caught_by("frozen")
class HoldsADict(Good):
    layers: dict = field(default_factory=lambda: {1: 2})


@caught_by("yaml")
class HoldsAFunction(Good):
    metric: object = torch.cosine_similarity


@caught_by("frozen")
class Thaws(Good):
    pass


Thaws.__setattr__ = object.__setattr__


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_exactly_the_right_check(name):
    strategy, expected = BROKEN[name]
    results = run_checks(strategy)
    failed = {result.check: result.detail for result in results if result.outcome == "failed"}
    assert set(failed) == expected, failed
    for result in results:
        if result.outcome == "failed":
            assert isinstance(result.error, CheckFailed)
            assert (result.error.check, result.error.strategy) == (result.check, strategy.__name__)
            assert result.detail in str(result.error)


class AllPairs(Good):
    def score(self, tokens):
        return norms(tokens) + torch.empty(tokens.count, tokens.count, dtype=torch.bool)[0, 0]


class SomePairs(AllPairs):
    def score(self, tokens):
        require_matrix(tokens.count, "pairs")
        return super().score(tokens)


def test_no_matrix_of_all_pairs_of_many_tokens():
    check = CHECKS["matrix-limit"]
    with pytest.raises(Problem, match="16512 tokens: compare tokens in tiles"):
        check.run(Subject.of(dataclass(frozen=True, kw_only=True)(AllPairs)))
    check.run(Subject.of(Fine))
    with pytest.raises(check.leaves, match="more than 16384"):
        check.run(Subject.of(dataclass(frozen=True, kw_only=True)(SomePairs)))


def test_each_check_is_named_and_explained():
    for name, check in CHECKS.items():
        assert check.name == name
        assert check.meaning.endswith(".")
        assert set(check.after) <= set(CHECKS)


@dataclass(frozen=True, kw_only=True)
class Fine(Good):
    pass


@dataclass(frozen=True, kw_only=True)
class Overlapping(Reducer):
    """Soft merging into overlapping outputs, one of them synthetic, is legal."""

    @property
    def record(self):
        return StrategyRecord(name="overlapping", target="a:b", summary="", kind="merge")

    def reduce(self, tokens):
        k, b, n = self.count(tokens.count), tokens.batch, tokens.count
        output = torch.cat([torch.arange(k), torch.full((n,), k - 1)]).expand(b, -1)
        source = torch.cat([torch.arange(k), torch.arange(n)]).expand(b, -1)
        value = torch.cat([torch.ones(k), torch.full((n,), 1 / n)]).expand(b, -1)
        weights = MergeWeights(output, source, value)
        assignment = torch.arange(n).clamp(max=k - 1).expand(b, -1)
        kept = Reduction(
            features=tokens.features[:, :k],
            positions=torch.arange(k).expand(b, -1),
            assignment=assignment,
            weights=weights,
            synthetic=(torch.arange(k) == k - 1).expand(b, -1),
        )
        return replace(kept, features=kept.apply(tokens.features))


@pytest.mark.parametrize(
    "strategy", [Fine, Fine(keep=3), lambda **budget: Fine(**budget), "norm-topk", Overlapping]
)
def test_sound_strategies_pass(strategy):
    assert [r for r in run_checks(strategy) if not r.ok] == []


def test_expected_failures_are_strict():
    scaled = BROKEN["ScalesWhatItKeeps"][0]
    results = {r.check: r for r in run_checks(scaled, {"features": "it rescales on purpose"})}
    assert results["features"].outcome == "expected failure"
    assert results["features"].detail == "it rescales on purpose"
    results = {r.check: r for r in run_checks(Fine, {"kind": "thought so"})}
    assert results["kind"].outcome == "failed"
    assert "expected to fail: thought so" in str(results["kind"].error)


def test_blocked_checks_name_what_blocks_them():
    results = {r.check: r for r in run_checks(BROKEN["ScoresOfOneItem"][0])}
    assert results["budget"].outcome == "blocked"
    assert "'shapes'" in results["budget"].detail
    assert not results["budget"].ok


def test_unknown_names():
    with pytest.raises(UnknownName, match="norm-topk"):
        run_checks("norm-topc")
    with pytest.raises(UnknownName, match="kind"):
        run_checks(Fine, {"kinds": "no such check"})
    with pytest.raises(RegistrationError, match="a strategy is"):
        run_checks(3)
    with pytest.raises(RegistrationError, match="from a budget to an instance"):
        run_checks(PerFrame)
    with pytest.raises(RegistrationError, match="needs weights"):
        run_checks("token-grouping")


class WithdrawsAll(registered_as(sites=("decoder",), count="adaptive"), Reducer):
    """Inside the LLM, a strategy may drop all, and take no budget."""

    adaptive = True

    def __post_init__(self):
        super().__post_init__()
        if self.budget is not None:
            raise BudgetError("keeps nothing: give no budget")

    def reduce(self, tokens):
        return Reduction.from_kept(tokens, torch.empty(tokens.batch, 0, dtype=torch.long))


def test_dropping_all_is_sound_inside_the_llm_alone():
    inside = dataclass(frozen=True, kw_only=True)(WithdrawsAll)
    results = {r.check: r for r in run_checks(inside)}
    assert [name for name, r in results.items() if not r.ok] == []
    assert results["keep-all"].outcome == "does not apply"

    class Before(registered_as(count="adaptive"), WithdrawsAll):
        pass

    before = dataclass(frozen=True, kw_only=True)(Before)
    results = {r.check: r for r in run_checks(before)}
    assert "kept nothing" in results["shapes"].detail


class MayReadKeys(registered_as(uses=("keys",)), Scorer):
    """Reads a signal where there is one."""

    def score(self, tokens):
        return tokens.signals.get("keys", tokens.features).float().norm(dim=-1)


def test_signals_that_are_read_where_carried_are_declared():
    declared = dataclass(frozen=True, kw_only=True)(MayReadKeys)
    assert [r for r in run_checks(declared) if not r.ok] == []

    class Secretly(registered_as(), MayReadKeys):
        pass

    secretly = dataclass(frozen=True, kw_only=True)(Secretly)
    results = {r.check: r for r in run_checks(secretly)}
    assert "does not declare" in results["signals"].detail


@parametrize_checks(Fine)
def test_three_lines_are_enough(check):
    check()


@parametrize_checks(
    BROKEN["ScalesWhatItKeeps"][0], expected_failures={"features": "rescales", "kind": "likewise"}
)
def test_expected_failures_under_pytest(check):
    check()


def test_unexpected_passes_under_pytest():
    cases = parametrize_checks(Fine, expected_failures={"kind": "thought so"}).mark.args[1]
    (bound,) = (case.values[0] for case in cases if case.id == "Fine-kind")
    with pytest.raises(CheckFailed, match="thought so"):
        bound()


def test_failures_under_pytest():
    cases = parametrize_checks(BROKEN["ScalesWhatItKeeps"][0]).mark.args[1]
    outcomes = {}
    for case in cases:
        try:
            case.values[0]()
        except CheckFailed:
            outcomes[case.id] = "failed"
        except pytest.skip.Exception:
            outcomes[case.id] = "blocked"
        else:
            outcomes[case.id] = "passed"
    assert outcomes["ScalesWhatItKeeps-features"] == "failed"
    assert outcomes["ScalesWhatItKeeps-kind"] == "blocked"
    assert outcomes["ScalesWhatItKeeps-positions"] == "passed"
