"""Checks of strategies that compare runs with each other, or watch one run from outside."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from tokenreduce.errors import BudgetError, TokenReduceError
from tokenreduce.plugins import installed
from tokenreduce.reducer import Merger, Reducer, Scorer, Selector
from tokenreduce.reduction import Reduction
from tokenreduce.testing.check import fail
from tokenreduce.testing.checks import CHECKS, CONTRACT
from tokenreduce.testing.elsewhere import Mixed, moved, pretending
from tokenreduce.testing.meter import Meter, metered
from tokenreduce.testing.settings import settings
from tokenreduce.testing.subject import Subject, cast, equal_reductions
from tokenreduce.tokens import Layout, VisualTokens


@CHECKS.add("weights", after=CONTRACT)
def check_weights(subject: Subject) -> None:
    """Weights are finite, and each token is assigned to the output that it chiefly flows into."""
    tokens = subject.image(5, 7, batch=2)
    for keep in (1, 9, 20):
        problem = _weight_problem(subject.create(keep=keep)(tokens))
        if problem:
            fail(f"{problem} (keep={keep} of 35)")


def _weight_problem(reduction: Reduction) -> str:
    assigned = reduction.assignment >= 0
    weights = reduction.weights
    if weights is None:
        if reduction.synthetic is None and bool((assigned.sum(1) != reduction.kept).any()):
            return "assigns tokens to outputs that no weights mix them into: drop them (-1)"
        return ""
    if not bool(weights.value.isfinite().all()) or bool((weights.value < 0).any()):
        return "returned weights that are negative, infinite or NaN"
    batch, n = reduction.assignment.shape
    item = torch.arange(batch)[:, None].expand_as(weights.output)
    flow = torch.zeros(batch, n, reduction.kept)
    place = (item, weights.source, weights.output)
    flow.index_put_(place, weights.value.float(), accumulate=True)
    most = flow.amax(2)
    if bool((assigned != (most > 0)).any()):
        return "says of a token that it was dropped, or was not, where its weights say otherwise"
    own = flow.gather(2, reduction.assignment.clamp(min=0)[..., None])[..., 0]
    if bool(((own < most - 1e-6) & assigned).any()):
        return "assigns a token to another output than the one that it flows into most"
    return ""


def _without_places(subject: Subject) -> str:
    """Why nothing can be said of equal tokens: a strategy may look at where they are."""
    if subject.record.kind != "prune":
        return "it does not prune"
    return "it looks at where tokens are" if subject.record.needs_grid else ""


@CHECKS.add("ties", after=(*CONTRACT, "determinism"), applies=_without_places)
def check_ties(subject: Subject) -> None:
    """Of equal tokens the first are kept, unless the strategy looks at where they are."""
    count = 40
    source = subject.tokens(Layout.line(count))
    shuffle = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    plain, shuffled = subject.create(keep=11)(source), subject.create(keep=11)(_at(source, shuffle))
    if not torch.equal(shuffle[shuffled.positions[0]].sort().values, plain.positions[0]):
        return
    twins = _at(source, torch.arange(count) % (count // 2))
    for keep in (3, 11):
        kept = set(subject.create(keep=keep)(twins).positions[0].tolist())
        for first in range(count // 2):
            if first not in kept and first + count // 2 in kept:
                fail(
                    f"kept token {first + count // 2} without token {first}, which is equal to it "
                    f"(keep={keep} of {count}): break ties by the lowest index (ops.top_k_indices)"
                )


def _at(tokens: VisualTokens, index: torch.Tensor) -> VisualTokens:
    """Tokens of a line, in another order."""
    vocabulary = installed().signals
    signals = {
        name: signal[:, index] if vocabulary[name].per_token else signal
        for name, signal in tokens.signals.items()
    }
    return VisualTokens(tokens.features[:, index], tokens.layout, signals=signals)


@CHECKS.add("precision", after=(*CONTRACT, "determinism", "dtypes"))
def check_precision(subject: Subject) -> None:
    """Half precision selects what float32 selects of the same values, large ones too."""
    source = subject.image(6, 8, batch=2)
    for dtype in (torch.float16, torch.bfloat16):
        for scale in (1.0, 256.0):
            half = cast(source, dtype, scale)
            reducer = subject.create(keep=9)
            try:
                narrow, wide = reducer(half), reducer(cast(half, torch.float32))
            except (TokenReduceError, RuntimeError) as error:
                fail(f"failed on {dtype} features of scale {scale:g}: {error}")
            for name in ("positions", "assignment"):
                if not torch.equal(getattr(narrow, name), getattr(wide, name)):
                    fail(
                        f"returned other {name} for {dtype} features of scale {scale:g} than for "
                        "the same values in float32: compute in float32 (features.float())"
                    )
            if not bool(narrow.features.isfinite().all()):
                fail(f"returned NaN or infinity for {dtype} features of scale {scale:g}")


@CHECKS.add("tiny", after=CONTRACT)
def check_tiny(subject: Subject) -> None:
    """Two to six tokens in a row or a column are reduced to every smaller count."""
    for count in range(2, 7):
        for grid in ((1, count), (count, 1)):
            for keep in range(1, count):
                where = f"(keep={keep} of {count}, grid {grid})"
                tokens = subject.image(*grid)
                try:
                    reduction = subject.create(keep=keep)(tokens)
                except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
                    fail(f"raised {type(error).__name__}: {error} {where}")
                problem = subject.problem(reduction, tokens)
                if not problem and reduction.kept not in subject.keep_range(count, keep=keep):
                    problem = f"kept {reduction.kept} tokens"
                if problem:
                    fail(f"{problem} {where}")


def _no_budget_to_refuse(subject: Subject) -> str:
    if subject.record.wraps:
        return "a wrapper's budget is that of what it wraps"
    return "" if subject.takes_budget else "it takes no budget"


@CHECKS.add("bad-budget", applies=_no_budget_to_refuse)
def check_bad_budget(subject: Subject) -> None:
    """Impossible and contradictory budgets raise a BudgetError when an instance is made."""
    impossible: list[dict[str, Any]] = [
        {"keep": -1},
        {"keep_ratio": 0.0},
        {"keep_ratio": 1.5},
        {"reduction": 0.5},
        {"keep": 4, "reduction": 2},
    ]
    if "decoder" not in subject.record.sites:
        impossible.append({"keep": 0})
    for budget in impossible:
        try:
            subject.factory(**budget)
        except BudgetError:
            continue
        except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
            fail(f"raised {type(error).__name__} for {budget}, expected a BudgetError")
        fail(f"took {budget}: a __post_init__ of its own has to call super().__post_init__()")


@CHECKS.add("globals", after=CONTRACT)
def check_globals(subject: Subject) -> None:
    """Settings of the process are left as they were."""
    tokens = subject.image(5, 7)
    before = settings()
    subject.create(keep=9)(tokens)
    changed = [name for name, value in settings().items() if value != before[name]]
    if changed:
        fail(f"changed settings of the whole process: {', '.join(changed)}")


@CHECKS.add("device", after=(*CONTRACT, "determinism"))
def check_device(subject: Subject) -> None:
    """What it makes lies where the features are: nothing is left on the CPU, or sent elsewhere."""
    tokens = subject.image(5, 7, batch=2)
    # Before it is registered, a sketch may leave out what only a GPU insists on.
    with torch.no_grad(), pretending(by_default=not subject.registered) as device:
        features, signals = moved(tokens.features), {n: moved(s) for n, s in tokens.signals.items()}
        try:
            reducer = subject.factory(keep=9) if subject.takes_budget else subject.factory()
            reducer.prepare(device, torch.float32)
            reducer(VisualTokens(features, tokens.layout, signals=signals))
        except Mixed as error:
            fail(f"mixes devices: {error}. Create tensors with device=tokens.features.device")
        except Exception:  # noqa: BLE001 (what cannot be pretended says nothing)
            return


#: Sides of the images that growth is measured between, and tokens kept of both.
SMALL_SIDE, LARGE_SIDE, FEW = 12, 24, 8
#: Cost classes whose rounds may grow with the tokens.
ROUNDS = ("coverage", "removal", "per_frame")
#: Tensors may be so many times what their cost class needs.
SLACK = 1.5


@CHECKS.add("scaling", after=CONTRACT)
def check_scaling(subject: Subject) -> None:
    """Tensors grow with N as the cost class says, and no loop runs over single tokens."""
    small, large = (_metered(subject, side) for side in (SMALL_SIDE, LARGE_SIDE))
    tokens, cost = LARGE_SIDE**2, subject.record.cost
    growth = (LARGE_SIDE / SMALL_SIDE) ** 2
    if cost == "score" and large.largest > growth * SLACK * small.largest:
        fail(
            f"made a tensor of {large.largest} numbers for {tokens} tokens, and one of "
            f"{small.largest} for {SMALL_SIDE**2}: more than linear, which its cost class 'score' "
            "says it is. Register it with another cost, such as 'graph', if it compares all pairs"
        )
    if large.largest > SLACK * tokens**2:
        fail(
            f"made a tensor of {large.largest} numbers for {tokens} tokens, more than {SLACK:g} "
            "matrices of tokens by tokens: compare pairs by matrix products, not by broadcasting"
        )
    if cost not in ROUNDS and large.operators > 2 * small.operators:
        fail(
            f"called {large.operators} operators for {tokens} tokens and {small.operators} for "
            f"{SMALL_SIDE**2}, keeping {FEW} of both: a loop over tokens"
        )


def _metered(subject: Subject, side: int) -> Meter:
    tokens = subject.image(side, side)
    reducer = subject.create(keep=FEW)
    # Once before: what is made once for a layout does not count.
    reducer(tokens)
    return metered(lambda: reducer(tokens))


@CHECKS.add(
    "compile",
    after=(*CONTRACT, "determinism"),
    applies=lambda s: "" if s.record.compiles else "it does not say that it compiles",
)
def check_compile(subject: Subject) -> None:
    """Compiled by torch as one graph, it gives what it gives otherwise."""
    tokens = subject.image(6, 8, batch=2)
    reducer = subject.create(keep=9)
    plain = reducer(tokens)
    with torch.no_grad():
        eager = _own_part(reducer, tokens)
        try:
            compiled = torch.compile(_own_part, fullgraph=True, backend="aot_eager")
            made = compiled(reducer, tokens)
        except Exception as error:  # noqa: BLE001 (whatever the compiler raises is the finding)
            reason = " ".join(str(error).split())[:300]
            fail(f"does not compile as one graph: {type(error).__name__}: {reason}")
        finally:
            torch.compiler.reset()
    if not torch.allclose(eager.float(), made.float(), rtol=1e-4, atol=1e-4):
        fail("gives other values compiled")
    problem = equal_reductions(plain, reducer(tokens))
    if problem:
        fail(f"{problem}, once it was compiled")


def _own_part(reducer: Reducer, tokens: VisualTokens) -> torch.Tensor:
    """What the author of a strategy wrote of it."""
    if isinstance(reducer, Scorer):
        return reducer.score(tokens)
    if isinstance(reducer, Selector):
        return reducer.select(tokens, reducer.count(tokens.count))
    if isinstance(reducer, Merger):
        assigned = reducer.assign(tokens, reducer.count(tokens.count))
        return assigned if isinstance(assigned, torch.Tensor) else assigned.groups
    return reducer.reduce(tokens).features


@CHECKS.add("documented", applies=lambda s: "" if s.registered else "it is not registered")
def check_documented(subject: Subject) -> None:
    """The class says in a docstring what it does, with each option, and the record in a line."""
    reducer = subject.create(keep=2)
    if not _written(type(reducer)):
        fail("has no docstring")
    text = " ".join(
        f"{_written(ancestor)} {getattr(inspect.getmodule(ancestor), '__doc__', '')}"
        for ancestor in type(reducer).__mro__
    )
    silent = [name for name in reducer.options() if name not in text]
    if silent:
        fail(f"does not explain {', '.join(silent)} in its docstring (Args:)")
    if not subject.record.summary.strip():
        fail("is registered without a summary")


def _written(cls: type) -> str:
    """The docstring of a class; a dataclass without one is given its signature instead."""
    text = vars(cls).get("__doc__") or ""
    return "" if text.startswith(f"{cls.__name__}(") else text
