"""The checks of strategies. Inputs are small and random, so a run takes a second or two."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from tokenreduce.capabilities import COST_LIMIT
from tokenreduce.errors import (
    BudgetError,
    MissingSignal,
    PositionsError,
    TokenReduceError,
    TokensError,
)
from tokenreduce.ops.limits import MATRIX_LIMIT
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.plugins import installed
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.testing.check import Checks, Problem, fail
from tokenreduce.testing.cost import measure_cost, one_thread, peak_growth
from tokenreduce.testing.meter import metered
from tokenreduce.testing.subject import (
    Subject,
    assignment_problem,
    cast,
    equal_reductions,
    feature_problem,
    position_problem,
    shape_problem,
    tiles,
    with_markers,
)
from tokenreduce.tokens import Layout, VisualTokens

CHECKS: Checks[Subject] = Checks()

#: Types that features come in.
TYPES = (torch.float32, torch.bfloat16, torch.float16)

#: What every check of behaviour builds upon.
CONTRACT = (
    "signals",
    "shapes",
    "budget",
    "positions",
    "assignment",
    "features",
    "no-mutation",
)


def _not_for_wrappers(subject: Subject) -> str:
    return "a wrapper's options hold strategies" if subject.record.wraps else ""


def _not_without_budget(subject: Subject) -> str:
    return "" if subject.takes_budget else "it takes no budget"


@CHECKS.add("record")
def check_record(subject: Subject) -> None:
    """The registered name resolves to this class, and record and class agree."""
    record, reducer = subject.record, subject.create(keep=2)
    if subject.registered:
        resolved = installed().strategies.resolve(record.name)
        if type(reducer) is not resolved:
            fail(f"creates a {type(reducer).__name__}, the name resolves to {resolved.__name__}")
        if reducer.name != record.name:
            fail(
                f"has the target {record.target!r}, of which the instance believes to be "
                f"{reducer.name!r}: one class is registered under two names"
            )
    vocabulary = installed().signals
    for name in (*record.needs, *record.uses):
        if name not in vocabulary:
            fail(f"reads the signal {name!r}, which no plugin registered")
    if record.wraps or not subject.takes_budget:
        return
    if reducer.adaptive != (record.count == "adaptive"):
        fail(
            f"is registered with count={record.count!r}, but its class says "
            f"adaptive={reducer.adaptive}"
        )


@CHECKS.add("frozen")
def check_frozen(subject: Subject) -> None:
    """An instance is a frozen dataclass: hashable, and equal to its pickled copy."""
    reducer = subject.create(keep=2)
    try:
        # Not by attribute syntax, since a static checker knows that it is frozen.
        setattr(reducer, BUDGET_FIELDS[0], 2)
    except dataclasses.FrozenInstanceError:
        pass
    else:
        fail("is not frozen: declare it with @dataclass(frozen=True, kw_only=True)")
    try:
        hash(reducer)
    except TypeError as error:
        fail(f"is not hashable ({error}): make its fields immutable")
    try:
        copy = pickle.loads(pickle.dumps(reducer))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        fail(f"cannot be pickled: {error}")
    if copy != reducer or hash(copy) != hash(reducer):
        fail("differs from its pickled copy")


@CHECKS.add("yaml", after=("frozen",), applies=_not_for_wrappers)
def check_yaml(subject: Subject) -> None:
    """The options are plain data, and come back from YAML as they were."""
    reducer = subject.create(keep=2)
    try:
        text = OmegaConf.to_yaml(OmegaConf.create(reducer.options()))
        options = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # noqa: BLE001 (any failure of the library is the finding)
        fail(f"has options that are not plain data ({type(error).__name__}): {reducer.options()}")
    copy = _rebuilt(reducer, options)
    if copy != reducer or copy.options() != reducer.options():
        fail(f"differs from its copy by way of YAML: {options}")


def _rebuilt(reducer: Reducer, options: Any) -> Reducer:
    given = {name: value for name, value in options.items() if name in _given(reducer)}
    given.update({name: getattr(reducer, name) for name in BUDGET_FIELDS})
    return type(reducer)(**given)


def _given(reducer: Reducer) -> set[str]:
    return {field.name for field in dataclasses.fields(reducer) if field.init}


@CHECKS.add("signals")
def check_signals(subject: Subject) -> None:
    """It reads the signals that its record declares, and complains when one is missing."""
    tokens = subject.image(5, 7)
    reducer = subject.create(keep=9)
    try:
        reducer(tokens)
    except MissingSignal as error:
        fail(
            f"reads a signal that its record does not declare ({', '.join(subject.needs)}): {error}"
        )
    except TokenReduceError:
        # Another check's business.
        pass
    if not _reads_only_what_it_declares(subject, reducer, tokens):
        fail("gives another result when it is offered signals that its record does not declare")
    for name in _unread(subject):
        fail(f"declares the signal {name!r}, but gives the same result whatever it holds")
    for name in subject.needs:
        others = {key: value for key, value in tokens.signals.items() if key != name}
        try:
            reducer(VisualTokens(tokens.features, tokens.layout, signals=others))
        except MissingSignal:
            continue
        fail(f"declares the signal {name!r}, but raised no MissingSignal without it")


def _unread(subject: Subject) -> list[str]:
    """Declared signals that change nothing, as far as that can be told."""
    if subject.record.needs_weights:
        # What they hold decides what is looked at.
        return []
    return [name for name in subject.needs if not _changes_something(subject, name)]


def _changes_something(subject: Subject, name: str) -> bool:
    for seed in range(4):
        # Some signals matter only once a budget is large enough.
        for grid, keep in (((5, 7), 3), ((5, 7), 9), ((5, 7), 20), ((12, 12), 72)):
            tokens, other = (subject.image(*grid, seed=number) for number in (seed, seed + 50))
            signals = {**tokens.signals, name: other.signals[name]}
            swapped = VisualTokens(tokens.features, tokens.layout, signals=signals)
            reducer = subject.create(keep=keep)
            try:
                if equal_reductions(reducer(tokens), reducer(swapped)):
                    return True
            except TokenReduceError:
                # Another check's business.
                return True
    return False


def _reads_only_what_it_declares(subject: Subject, reducer: Reducer, tokens: VisualTokens) -> bool:
    """Whether undeclared signals change nothing, as far as that can be told."""
    results = []
    for given in (tokens, tokens, subject.with_all_signals(tokens)):
        try:
            with _seeded(0):
                results.append(reducer(given))
        except TokenReduceError:
            # Another check's business, as are dice and a result that changes by itself.
            return True
    plain, again, offered = results
    return bool(equal_reductions(plain, again)) or not equal_reductions(plain, offered)


@CHECKS.add("shapes", after=("signals",), leaves=(PositionsError,))
def check_shapes(subject: Subject) -> None:
    """Outputs have the shapes, types and device of the contract."""
    for batch in (1, 2):
        tokens = subject.image(5, 7, batch=batch)
        # Around the framework's own checks, which would mix up shape and count.
        reduction = subject.create(keep=9).reduce(tokens)
        problem = shape_problem(reduction, tokens, may_be_empty=subject.may_drop_all)
        if problem:
            fail(f"{problem} (keep=9 of 35, batch of {batch})")


@CHECKS.add("budget", after=("shapes",), leaves=(PositionsError,))
def check_budget(subject: Subject) -> None:
    """It keeps what the budget says, however stated; less only if its count class allows."""
    for grid in ((6, 6), (5, 7), (1, 13)):
        for budget in (
            {"keep": 1},
            {"keep": 4},
            {"keep": grid[0] * grid[1] - 1},
            {"keep_ratio": 0.3},
            {"keep_ratio": 0.0001},
            {"reduction": 2},
            {"reduction": 3.7},
        ):
            tokens = subject.image(*grid)
            allowed = subject.keep_range(tokens.count, **budget)
            kept = subject.create(**budget)(tokens).kept
            if kept not in allowed:
                wanted = str(allowed[-1]) if len(allowed) == 1 else f"1 to {allowed[-1]}"
                fail(f"kept {kept} of {tokens.count} tokens with {budget}, expected {wanted}")
            if subject.record.count == "layout":
                other = subject.create(**budget)(subject.image(*grid, seed=1)).kept
                if other != kept:
                    fail(
                        f"kept {kept} tokens of one image and {other} of another of the same grid "
                        f"with {budget}: register it with count='adaptive'"
                    )


@CHECKS.add("positions", after=("budget",))
def check_positions(subject: Subject) -> None:
    """Outputs stand at unique, ascending source positions."""
    tokens = subject.image(5, 7, batch=2)
    for keep in (1, 9, 20):
        problem = position_problem(subject.create(keep=keep)(tokens), tokens.count)
        if problem:
            fail(f"{problem} (keep={keep} of 35)")


@CHECKS.add("assignment", after=("positions",))
def check_assignment(subject: Subject) -> None:
    """Each source token goes to an output or is dropped; outputs own the tokens they stand at."""
    tokens = subject.image(5, 7, batch=2)
    for keep in (1, 9, 20):
        problem = assignment_problem(subject.create(keep=keep)(tokens))
        if problem:
            fail(f"{problem} (keep={keep} of 35)")


@CHECKS.add("features", after=("assignment",))
def check_features(subject: Subject) -> None:
    """Output features are what positions and weights make of the source features."""
    tokens = subject.image(5, 7, batch=2)
    for keep in (1, 9, 20):
        problem = feature_problem(subject.create(keep=keep)(tokens), tokens)
        if problem:
            fail(f"{problem} (keep={keep} of 35)")


@CHECKS.add("no-mutation", after=("features",))
def check_no_mutation(subject: Subject) -> None:
    """Inputs are left as they were."""
    _find_written(subject, subject.image(5, 7, batch=2))


def _find_written(subject: Subject, plain: VisualTokens) -> None:
    sizes = 1 + plain.features[..., 0].abs().round()
    tokens = VisualTokens(plain.features, plain.layout, sizes=sizes, signals=plain.signals)
    inputs: dict[str, Tensor] = {
        "features": tokens.features,
        "coords": tokens.layout.coords,
        "protected": tokens.layout.protected,
        "sizes": sizes,
        **tokens.signals,
    }
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    subject.create(keep=9)(tokens)
    for name, tensor in inputs.items():
        if not torch.equal(tensor, before[name]):
            fail(f"wrote into its input {name!r}")


@CHECKS.add("kind", after=CONTRACT)
def check_kind(subject: Subject) -> None:
    """A strategy registered as pruning returns source tokens bit by bit."""
    tokens = subject.image(5, 7, batch=2)
    reduction = subject.create(keep=9)(tokens)
    gathered = tokens.features[torch.arange(2)[:, None], reduction.positions]
    if subject.record.kind == "prune" and not torch.equal(reduction.features, gathered):
        fail("is registered as kind='prune', but changes the tokens that it keeps")


@CHECKS.add("keep-all", after=CONTRACT, applies=_not_without_budget)
def check_keep_all(subject: Subject) -> None:
    """With a budget of all tokens or more, everything stays bit-identical, with a reason."""
    tokens = subject.image(4, 5)
    for budget in ({"keep": 20}, {"keep": 400}, {"keep_ratio": 1.0}, {"reduction": 1}):
        reduction = subject.create(**budget)(tokens)
        if not torch.equal(reduction.features, tokens.features):
            fail(f"changed the tokens with {budget} of 20, expected them bit-identical")
        if not reduction.reason:
            fail(f"gave no reason for keeping all with {budget} of 20")


@CHECKS.add("determinism", after=CONTRACT)
def check_determinism(subject: Subject) -> None:
    """The same input gives the same bits, whatever was called before, and no global randomness."""
    tokens, other = subject.image(5, 7), subject.image(5, 7, seed=1)
    reducer = subject.create(keep=9)
    runs = []
    for seed in (1, 2):
        with _seeded(seed):
            states = _random_states()
            runs.append(reducer(tokens))
            for library, state in _random_states().items():
                if state != states[library]:
                    fail(
                        f"draws from the global random state of {library}: seed from content "
                        "(ops.content_seed)"
                    )
    _compare_bits(runs[0], runs[1], "for the same input, called again")
    # Another input of the same shape, and others of other shapes, have come between.
    reducer(subject.image(1, 13))
    meanwhile = reducer(other)
    _compare_bits(runs[0], reducer(tokens), "for the same input, after others")
    _compare_bits(meanwhile, subject.create(keep=9)(other), "than a new instance")
    _compare_bits(runs[0], subject.create(keep=9)(tokens), "than a new instance")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random states of all libraries seeded, and put back afterwards."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
    }


def _compare_bits(one: Reduction, other: Reduction, when: str) -> None:
    problem = equal_reductions(one, other)
    if problem or not torch.equal(one.features, other.features):
        fail(f"{problem or 'returned different bits'} {when}")


@CHECKS.add("batch-invariance", after=(*CONTRACT, "determinism"))
def check_batch_invariance(subject: Subject) -> None:
    """An item is reduced alike alone, in a batch, and in another order."""
    _compare_batches(subject, subject.image(5, 7, batch=3))


def _compare_batches(subject: Subject, batch: VisualTokens) -> None:
    reducer = subject.create(keep=9)
    alone = [reducer(batch.item(i)) for i in range(3)]
    for order in ((0, 1, 2), (2, 0, 1)):
        index = torch.tensor(order)
        mixed = VisualTokens(
            batch.features[index],
            batch.layout,
            signals={name: signal[index] for name, signal in batch.signals.items()},
        )
        if subject.record.count == "adaptive":
            packed = PackedTokens.from_items([mixed.item(i) for i in range(3)])
            together = reduce_packed(packed, [reducer] * 3)
        else:
            whole = reducer(mixed)
            together = [whole.item(i) for i in range(3)]
        for place, item in enumerate(order):
            problem = equal_reductions(alone[item], together[place])
            if problem:
                fail(f"{problem} for an item alone and in a batch of 3 (order {order})")


@CHECKS.add("layouts", after=(*CONTRACT, "frozen", "determinism", "batch-invariance"))
def check_layouts(subject: Subject) -> None:
    """Images, clips, rows and tiles are served, apart and packed together, two of each."""
    layouts = 2 * list(subject.layouts().items())
    items = [subject.tokens(layout, seed=seed) for seed, (_, layout) in enumerate(layouts)]
    reducer = subject.create(keep_ratio=0.5)
    apart = []
    for (name, _), item in zip(layouts, items, strict=True):
        try:
            apart.append(reducer(item))
        except TokenReduceError as error:
            fail(f"refused {name!r}: {error} If it needs a grid, register it with needs_grid=True")
        problem = subject.problem(apart[-1], item)
        if not problem and apart[-1].kept not in subject.keep_range(item.count, keep_ratio=0.5):
            problem = f"kept {apart[-1].kept} of {item.count} tokens with keep_ratio=0.5"
        if problem:
            fail(f"{problem} ({name})")
    packed = PackedTokens.from_items(items)
    for one, other in zip(apart, reduce_packed(packed, [reducer] * len(items)), strict=True):
        problem = equal_reductions(one, other)
        if problem:
            fail(f"{problem} for an item alone and packed with others")


@CHECKS.add(
    "grid",
    after=CONTRACT,
    applies=lambda subject: "" if subject.record.needs_grid else "it needs no grid",
)
def check_grid(subject: Subject) -> None:
    """A strategy that needs a grid refuses tokens without one with a TokensError."""
    try:
        subject.create(keep_ratio=0.5)(subject.tokens(tiles()))
    except TokensError:
        return
    fail("is registered with needs_grid=True, but took tiles without a TokensError")


@CHECKS.add("protected", after=CONTRACT)
def check_protected(subject: Subject) -> None:
    """Protected tokens survive bit-identically, outside the budget."""
    layout = with_markers(Layout.from_grid((4, 6)), (4, 6))
    tokens = subject.tokens(layout, batch=2)
    guarded = layout.protected.nonzero().squeeze(1)
    for keep in (1, 7):
        reduction = subject.create(keep=keep)(tokens)
        problem = subject.problem(reduction, tokens)
        if problem:
            fail(f"{problem} (with protected tokens)")
        allowed = subject.keep_range(24, keep=keep)
        if reduction.kept - len(guarded) not in allowed:
            fail(
                f"kept {reduction.kept} tokens with keep={keep} and {len(guarded)} protected "
                f"ones, expected {allowed[-1] + len(guarded)}"
            )
        for b in range(2):
            output = torch.isin(reduction.positions[b], guarded)
            if int(output.sum()) != len(guarded):
                fail("dropped or merged a protected token")
            if not torch.equal(reduction.features[b, output], tokens.features[b, guarded]):
                fail("changed a protected token")


@CHECKS.add("dtypes", after=CONTRACT)
def check_dtypes(subject: Subject) -> None:
    """float32, bfloat16 and float16 come out as they went in, finite."""
    source = subject.image(5, 7, batch=2)
    for dtype in TYPES:
        _reduce_typed(subject, cast(source, dtype), str(dtype))


def _reduce_typed(subject: Subject, tokens: VisualTokens, where: str) -> Reduction:
    dtype = tokens.features.dtype
    try:
        reduction = subject.create(keep=9)(tokens)
    except (TokenReduceError, RuntimeError) as error:
        fail(f"failed on {where}: {error}")
    problem = subject.problem(reduction, tokens)
    if problem:
        fail(f"{problem} ({where})")
    if reduction.features.dtype != dtype:
        fail(f"returned {reduction.features.dtype} for {where}")
    if not bool(reduction.features.isfinite().all()):
        fail(f"returned NaN or infinity for finite features ({where})")
    return reduction


@CHECKS.add("everywhere", after=(*CONTRACT, "layouts", "dtypes", "precision", "globals"))
def check_everywhere(subject: Subject) -> None:
    """Clips, rows and tiles too: nothing is written into, in batches of any type, as when alone."""
    for name, layout in subject.layouts().items():
        batch = subject.tokens(layout, batch=3)
        for dtype in TYPES:
            held, where = cast(batch, dtype), f"{name}, {dtype}"
            try:
                if dtype == torch.float32:
                    _find_written(subject, held)
                _compare_batches(subject, held)
            except Problem as problem:
                fail(f"{problem} ({where})")
            if subject.record.count == "adaptive":
                # Its batches are packed, as they were when they were compared.
                continue
            narrow = _reduce_typed(subject, held, where)
            wide = subject.create(keep=9)(cast(held, torch.float32))
            if not torch.equal(narrow.assignment, wide.assignment):
                fail(f"returned another assignment than for the same values in float32 ({where})")


@CHECKS.add("gradients", after=(*CONTRACT, "globals"))
def check_gradients(subject: Subject) -> None:
    """Gradients reach every kept token."""
    source = subject.image(5, 7, batch=2)
    features = source.features.clone().requires_grad_()
    tokens = VisualTokens(features, source.layout, signals=source.signals)
    reduction = subject.create(keep=9)(tokens)
    if not reduction.features.requires_grad:
        fail("cut the gradient: its features do not depend on the source features any more")
    reduction.features.sum().backward()
    gradient = features.grad
    if gradient is None or not bool(gradient.isfinite().all()):
        fail("passed no finite gradient to the source features")
    at_kept = gradient.abs().sum(-1).gather(1, reduction.positions)
    if reduction.synthetic is not None:
        at_kept = at_kept.masked_fill(reduction.synthetic, 1)
    if not bool((at_kept > 0).all()):
        fail("passed no gradient to a kept token")


def _reads_features(subject: Subject) -> str:
    if subject.record.wraps:
        return "a wrapper reads what its strategies read"
    return "it reads the features" if subject.record.reads_features else ""


@CHECKS.add("unread-features", after=CONTRACT, applies=_reads_features)
def check_unread_features(subject: Subject) -> None:
    """If it says that it does not read the features, it keeps the same tokens of any others."""
    tokens, others = subject.image(5, 7, batch=2), subject.image(5, 7, batch=2, seed=1)
    reducer = subject.create(keep=9)
    kept = reducer(tokens)
    again = reducer(VisualTokens(others.features, tokens.layout, signals=tokens.signals))
    if not kept.assignment.equal(again.assignment) or not kept.positions.equal(again.positions):
        fail("keeps other tokens of other features; its record says reads_features=False")


@CHECKS.add("non-finite", after=(*CONTRACT, "unread-features"))
def check_non_finite(subject: Subject) -> None:
    """NaN and infinity in the features raise a TokensError, where they are read or kept."""
    reducer = subject.create(keep=9)
    for value in (float("nan"), float("inf")):
        tokens = subject.image(5, 7)
        tokens.features[0, 3 if reducer.reads_features else slice(None), 2] = value
        try:
            reduction = reducer(tokens)
        except TokensError:
            continue
        if not reducer.reads_features and reduction.kept == 0:
            continue
        fail(f"took features that hold {value} without a TokensError")


@CHECKS.add("degenerate", after=CONTRACT)
def check_degenerate(subject: Subject) -> None:
    """Equal tokens, zeros, one token, one frame and one row or column are reduced like others."""
    for fill in (0.0, 1.0):
        tokens = subject.image(5, 7, batch=2)
        _reduce_odd(subject, "all tokens equal" if fill else "all zeros", tokens, 9, fill)
    for name, grid, keep in (
        ("one frame", (1, 4, 5), 6),
        ("one row", (1, 9), 4),
        ("one column", (9, 1), 4),
        ("two tokens", (1, 2), 1),
        ("one token a frame, one frame", (1, 1, 1), 1),
    ):
        _reduce_odd(subject, name, subject.image(*grid), keep, None)


def _reduce_odd(
    subject: Subject, name: str, tokens: VisualTokens, keep: int, fill: float | None
) -> None:
    if fill is not None:
        tokens = VisualTokens(
            torch.full_like(tokens.features, fill), tokens.layout, signals=tokens.signals
        )
    try:
        reduction: Reduction = subject.create(keep=keep)(tokens)
    except (TokenReduceError, RuntimeError, IndexError, ZeroDivisionError) as error:
        fail(f"failed on {name}: {error}")
    problem = subject.problem(reduction, tokens)
    if not problem and not bool(reduction.features.isfinite().all()):
        problem = "returned NaN or infinity"
    if not problem and reduction.kept not in subject.keep_range(tokens.count, keep=keep):
        problem = f"kept {reduction.kept} tokens, its budget says {keep}"
    if problem:
        fail(f"{problem} ({name}, keep={keep})")


@CHECKS.add("non-contiguous", after=(*CONTRACT, "determinism"))
def check_non_contiguous(subject: Subject) -> None:
    """Tensors that are not contiguous give what their contiguous copies give."""
    tokens = subject.image(5, 7, batch=2)

    def strided(tensor: Tensor) -> Tensor:
        spread = torch.stack([tensor, torch.full_like(tensor, 7)], dim=-1)[..., 0]
        return spread.transpose(0, 1).contiguous().transpose(0, 1) if tensor.ndim > 1 else spread

    views = VisualTokens(
        strided(tokens.features),
        tokens.layout,
        signals={name: strided(signal) for name, signal in tokens.signals.items()},
    )
    reducer = subject.create(keep=9)
    try:
        problem = equal_reductions(reducer(tokens), reducer(views))
    except RuntimeError as error:
        fail(f"failed on tensors that are not contiguous: {error}")
    if problem:
        fail(f"{problem} for tensors that are not contiguous")


@CHECKS.add("no-budget", after=CONTRACT)
def check_no_budget(subject: Subject) -> None:
    """Without a budget, an adaptive strategy decides by itself; any other raises BudgetError."""
    if subject.record.wraps:
        return
    reducer, tokens = subject.create(), subject.image(5, 7)
    try:
        reduction = reducer(tokens)
    except BudgetError:
        if subject.record.count == "adaptive":
            fail("is adaptive, but raised BudgetError without a budget")
        return
    if subject.takes_budget and subject.record.count != "adaptive":
        fail("is not adaptive, but ran without a budget, expected a BudgetError")
    problem = subject.problem(reduction, tokens)
    if problem:
        fail(f"{problem} (without a budget)")


#: Times are compared on one thread, and with room for a machine that others use too.
SLACK = 1.5
#: The clips that costs are measured on, with 1024 channels, an eighth of which is kept.
TIMED, WEIGHED, WIDTH = (16, 12, 12), (32, 14, 14), 1024
#: The most memory beside the inputs, in matrices of tokens by tokens.
MATRICES = 1.5


def _without_limit(subject: Subject) -> str:
    if subject.record.wraps:
        return "a wrapper costs what it wraps"
    cost = subject.record.cost
    return "" if cost in COST_LIMIT else f"no limit is set for the cost class {cost!r}"


@CHECKS.add("cost", after=CONTRACT, applies=_without_limit, slow=True)
def check_cost(subject: Subject) -> None:
    """It takes no longer than its cost class allows, in products of the features' Gram matrix."""
    tokens = subject.tokens(Layout.from_grid(TIMED), channels=WIDTH)
    reducer = subject.create(keep=tokens.count // 8)
    limit = COST_LIMIT[subject.record.cost]
    with one_thread():
        cost = measure_cost(reducer, tokens, rounds=7)
    if cost.grams > limit * SLACK:
        fail(
            f"took {cost.grams:.2f} Gram products of {tokens.count} tokens ({cost.ms:.0f} ms); its "
            f"cost class {subject.record.cost!r} allows {limit:g}, here {limit * SLACK:g}"
        )


def _not_per_frame(subject: Subject) -> str:
    return "" if subject.record.cost == "per_frame" else "its cost class is not 'per_frame'"


@CHECKS.add("frames", after=CONTRACT, applies=_not_per_frame, slow=True)
def check_frames(subject: Subject) -> None:
    """Four times the frames take about four times as long, if its cost class is per_frame."""
    times = []
    for frames in (8, 32):
        tokens = subject.tokens(Layout.from_grid((frames, 12, 12)), channels=WIDTH)
        reducer = subject.create(keep=tokens.count // 8)
        with one_thread():
            times.append(measure_cost(reducer, tokens, rounds=7).ms)
    if times[1] > 4 * SLACK * times[0]:
        fail(
            f"took {times[1] / times[0]:.1f} times as long for 4 times the frames "
            f"({times[0]:.0f} and {times[1]:.0f} ms): its cost is not linear in frames"
        )


@CHECKS.add("memory", after=CONTRACT, slow=True)
def check_memory(subject: Subject) -> None:
    """Beside its inputs it needs no more than 1.5 matrices of tokens by tokens."""
    tokens = subject.tokens(Layout.from_grid(WEIGHED), channels=WIDTH)
    reducer = subject.create(keep=tokens.count // 8)
    with one_thread(), torch.no_grad():
        # Once before, so that libraries have the buffers that they keep.
        reducer(tokens)
        grown = peak_growth(lambda: reducer(tokens))
    matrix = 4 * tokens.count**2
    if grown is not None and grown > MATRICES * matrix:
        fail(
            f"needed {grown / 2**20:.0f} MiB beside its inputs for {tokens.count} tokens, "
            f"{grown / matrix:.2f} matrices of tokens by tokens; {MATRICES} are allowed"
        )


#: An image of more tokens than a matrix of tokens by tokens is made of.
HUGE = (129, MATRIX_LIMIT // 128)


@CHECKS.add("matrix-limit", after=CONTRACT, slow=True, leaves=(TokensError,))
def check_matrix_limit(subject: Subject) -> None:
    """Beyond 16384 tokens it makes no matrix of tokens by tokens: it does without, or refuses."""
    tokens = subject.tokens(Layout.from_grid(HUGE), channels=4)
    reducer = subject.create(keep=8)
    with one_thread(), torch.no_grad():
        largest = metered(lambda: reducer(tokens)).largest
    if largest > tokens.count**2 // 2:
        fail(
            f"made a tensor of {largest} numbers for {tokens.count} tokens: compare tokens in "
            "tiles, or refuse so many with a TokensError (ops.limits.require_matrix)"
        )
