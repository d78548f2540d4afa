"""Checks of model adapters, on a model that they serve."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.api import create_strategy
from tokenreduce.attachment import Attachment, ModelAdapter, find_adapter
from tokenreduce.errors import (
    AttachmentError,
    MissingSignal,
    RegistrationError,
    TokenReduceError,
)
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.stage import Stage
from tokenreduce.testing.check import Checks, fail
from tokenreduce.testing.kit import NONE, CheckResult, Run, parametrized
from tokenreduce.testing.traces import trace_of

#: More than any item has.
ALL = 1 << 20


@dataclass(frozen=True, kw_only=True)
class AdapterSubject:
    """A model adapter under test, with a model that it serves.

    Attributes:
        name: what to call it.
        factory: makes an instance, as attaching does.
        model: makes a small model with weights; called once for each check.
        inputs: makes the inputs of one prompt with at least one visual item.
        processor: the model's processor, if it has one.
        grids: (T, H, W) of each item of the inputs, if they are known.
        keep: how many tokens of an item to keep; fewer than any has.
        registered: whether it was given by its registered name.
    """

    name: str
    factory: Callable[[], ModelAdapter]
    model: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    processor: Any = None
    grids: tuple[tuple[int, int, int], ...] = ()
    keep: int = 5
    registered: bool = False

    def given(self) -> dict[str, Any]:
        """The inputs, copied: models may change what they are given."""
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in self.inputs().items()}

    @contextmanager
    def attached(self, model: nn.Module, keep: int) -> Iterator[Attachment]:
        """The adapter on a model, keeping so many tokens of every item."""
        with self.factory().attach(model, _stages(keep), self.processor) as run:
            yield run

    def logits(self, model: Any) -> Tensor:
        """What the model makes of the inputs."""
        with torch.no_grad():
            logits: Tensor = model(**self.given()).logits
        return logits


ADAPTER_CHECKS: Checks[AdapterSubject] = Checks()


def _stages(keep: int) -> tuple[Stage, ...]:
    return (Stage(reducer=create_strategy("norm-topk", keep=keep)),)


@ADAPTER_CHECKS.add("interface")
def check_interface(subject: AdapterSubject) -> None:
    """It is made without arguments, and has the methods check and attach."""
    try:
        adapter = subject.factory()
    except TypeError as error:
        fail(f"cannot be created without arguments: {error}")
    for method in ("check", "attach"):
        if not callable(getattr(adapter, method, None)):
            fail(f"has no method {method}")


@ADAPTER_CHECKS.add(
    "serves",
    after=("interface",),
    applies=lambda s: "" if s.registered else "it is not registered",
)
def check_serves(subject: AdapterSubject) -> None:
    """It is the adapter that attaching finds for the model."""
    model = subject.model()
    found, own = type(find_adapter(model)), type(subject.factory())
    if found is not own:
        name = f"{type(model).__module__}.{type(model).__qualname__}"
        fail(f"is not found for a {name}, which {found.__name__} serves: see its 'models'")


@ADAPTER_CHECKS.add("check", after=("interface",))
def check_check(subject: AdapterSubject) -> None:
    """Its method check needs no weights and leaves no trace."""
    model = subject.model().to("meta")
    before = trace_of(model)
    try:
        subject.factory().check(model, _stages(subject.keep), subject.processor)
    except NotImplementedError as error:
        fail(f"reads weights to check a model: {error}")
    difference = before.difference(trace_of(model))
    if difference:
        fail(f"changed a model by checking it: {difference}")


@ADAPTER_CHECKS.add("engages", after=("interface",))
def check_engages(subject: AdapterSubject) -> None:
    """Attached, every item is reduced to the budget, and the LLM computes fewer tokens."""
    model = subject.model()
    with subject.attached(model, subject.keep) as run:
        subject.logits(model)
        receipt = run.receipt
    if not receipt.items:
        fail(f"saw no visual item in the inputs ({receipt.reason or 'no reason given'})")
    if subject.grids and len(receipt.items) != len(subject.grids):
        fail(f"saw {len(receipt.items)} items, expected {len(subject.grids)}")
    for number, item in enumerate(receipt.items):
        if item.tokens_in <= subject.keep:
            fail(f"saw {item.tokens_in} tokens of item {number}: give inputs with more")
    gone = sum(item.tokens_in - item.tokens_out for item in receipt.items)
    for number, reduction in enumerate(run.reductions):
        allowed = subject.keep + reduction.layout.protected_count
        if len(reduction.kept) != allowed:
            fail(f"kept {len(reduction.kept)} tokens of item {number}, expected {allowed}")
    ids = subject.given().get("input_ids")
    alone = ids is None or len(ids) == 1
    shorter = receipt.sequence_in - receipt.sequence_out
    if shorter <= 0 or (alone and shorter != gone):
        fail(
            f"dropped {gone} tokens, but the LLM's sequence went from {receipt.sequence_in} to "
            f"{receipt.sequence_out}"
        )


_ENGAGED = ("engages",)


@ADAPTER_CHECKS.add("items", after=_ENGAGED)
def check_items(subject: AdapterSubject) -> None:
    """Items are where their placeholders stand, each token at a place of its own."""
    model = subject.model()
    with subject.attached(model, subject.keep) as run:
        subject.logits(model)
        reductions = run.reductions
    ids = subject.given().get("input_ids")
    taken: set[tuple[int, int]] = set()
    for number, item in enumerate(reductions):
        columns = item.columns.tolist()
        if len(item.layout) != len(columns):
            fail(f"lays out {len(item.layout)} tokens of item {number}, which has {len(columns)}")
        if ids is not None and len(ids[item.prompt, item.columns].unique()) != 1:
            fail(f"places item {number} at columns that do not all hold the same placeholder")
        places = {(item.prompt, column) for column in columns}
        if len(places) != len(columns) or places & taken:
            fail(f"gives item {number} a column twice")
        taken |= places
        free = item.layout.coords[~item.layout.protected]
        if len(free.unique(dim=0)) != len(free):
            fail(f"lays out two tokens of item {number} at the same place")
        if subject.grids and item.layout.grid != subject.grids[number]:
            fail(
                f"lays out item {number} on the grid {item.layout.grid}, expected "
                f"{subject.grids[number]}"
            )


def _not_watchable(subject: AdapterSubject) -> str:
    model = subject.model()
    if _first_layer(model) is None:
        return "the model has no get_decoder() with layers to watch"
    given = subject.given().get("input_ids")
    return "" if given is None or len(given) == 1 else "the inputs hold more than one prompt"


@ADAPTER_CHECKS.add("reads", after=("items",), applies=_not_watchable)
def check_reads(subject: AdapterSubject) -> None:
    """The LLM's first layer is given the kept embeddings, and the text, as they were."""
    full, kept, columns = _watched(subject)
    if kept.states.shape[1] != len(columns):
        fail(
            f"gives the LLM {kept.states.shape[1]} tokens, expected {len(columns)}: the text and "
            "what was kept"
        )
    if not torch.equal(kept.states, full.states[:, columns]):
        fail("gives the LLM other embeddings than the kept ones, or in another order")


@ADAPTER_CHECKS.add("positions", after=("reads",), applies=_not_watchable)
def check_positions(subject: AdapterSubject) -> None:
    """Every token that is left keeps the position that it had in the full sequence."""
    full, kept, columns = _watched(subject)
    for name, whole in full.positions.items():
        part = kept.positions.get(name)
        if part is None or whole.shape[-1] == 0:
            continue
        axis = next((a for a in range(whole.ndim) if whole.shape[a] == full.states.shape[1]), None)
        if axis is None:
            continue
        wanted = whole.index_select(axis, columns)
        if part.shape[axis] != len(columns) or not torch.equal(part, wanted):
            fail(f"gives the kept tokens other positions than they had ({name})")


@ADAPTER_CHECKS.add("keep-all", after=_ENGAGED)
def check_keep_all(subject: AdapterSubject) -> None:
    """With a budget of all tokens the logits are those of the model alone, to the bit."""
    model = subject.model()
    expected = subject.logits(model)
    with subject.attached(model, ALL) as run:
        found = subject.logits(model)
        if any(item.tokens_in != item.tokens_out for item in run.receipt.items):
            fail("dropped tokens with a budget of all")
    if not torch.equal(expected, found):
        fail("changes the logits though all tokens are kept")


@ADAPTER_CHECKS.add("detach", after=_ENGAGED)
def check_detach(subject: AdapterSubject) -> None:
    """Detached, also after an error, nothing of it is left on the model or its classes."""
    model = subject.model()
    expected = subject.logits(model)
    before = trace_of(model)
    with subject.attached(model, subject.keep):
        subject.logits(model)
    difference = before.difference(trace_of(model))
    if difference:
        fail(f"left a trace: {difference}")
    if not torch.equal(expected, subject.logits(model)):
        fail("left a model whose logits are others than before")
    try:
        with subject.attached(model, subject.keep):
            raise KeyError
    except KeyError:
        pass
    difference = before.difference(trace_of(model))
    if difference:
        fail(f"left a trace after an error: {difference}")


@ADAPTER_CHECKS.add("instances", after=_ENGAGED)
def check_instances(subject: AdapterSubject) -> None:
    """Another model of the same class is none of its business."""
    model, other = subject.model(), subject.model()
    expected, before = subject.logits(other), trace_of(other)
    with subject.attached(model, subject.keep):
        difference = before.difference(trace_of(other))
        found = subject.logits(other)
    if difference:
        fail(f"changed another model of the class: {difference}")
    if not torch.equal(expected, found):
        fail("changes the logits of another model of the class")


@ADAPTER_CHECKS.add("twice", after=_ENGAGED)
def check_twice(subject: AdapterSubject) -> None:
    """A second attachment raises an AttachmentError and leaves the first alone."""
    model = subject.model()
    with subject.attached(model, subject.keep) as run:
        try:
            subject.factory().attach(model, _stages(subject.keep), subject.processor).detach()
        except AttachmentError:
            pass
        else:
            fail("was attached a second time without an AttachmentError")
        subject.logits(model)
        if run.receipt.tokens_out >= run.receipt.tokens_in:
            fail("reduces nothing any more once a second attachment was refused")


@ADAPTER_CHECKS.add("no-mutation", after=_ENGAGED)
def check_no_mutation(subject: AdapterSubject) -> None:
    """Weights and inputs are left as they were."""
    model = subject.model()
    weights = copy.deepcopy(model.state_dict())
    inputs, before = subject.given(), subject.given()
    with subject.attached(model, subject.keep), torch.no_grad():
        model(**inputs)
    for name, value in before.items():
        if torch.is_tensor(value) and not torch.equal(value, inputs[name]):
            fail(f"wrote into the input {name!r}")
    for name, weight in model.state_dict().items():
        if not torch.equal(weight, weights[name]):
            fail(f"wrote into the weight {name!r}")


@ADAPTER_CHECKS.add("refuses", after=("detach",))
def check_refuses(subject: AdapterSubject) -> None:
    """What cannot be served is refused with a typed error, and leaves no trace."""
    model = subject.model()
    before = trace_of(model)
    reducer = _needing("joint_image_embeddings")
    try:
        run = subject.factory().attach(model, (Stage(reducer=reducer),), subject.processor)
    except MissingSignal:
        pass
    except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
        fail(f"raised {type(error).__name__} for a missing signal, expected MissingSignal")
    else:
        run.detach()
        fail("took a strategy that needs a joint encoder, without one: expected MissingSignal")
    for stage in _elsewhere(subject.keep):
        try:
            subject.factory().check(model, (stage,), subject.processor)
        except TokenReduceError:
            continue
        except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
            fail(f"raised {type(error).__name__} for a stage at the site {stage.site!r}: {error}")
    difference = before.difference(trace_of(model))
    if difference:
        fail(f"left a trace of what it refused: {difference}")


@ADAPTER_CHECKS.add(
    "generate",
    after=("reads", "keep-all", "instances", "no-mutation"),
    applies=lambda s: "" if hasattr(s.model(), "generate") else "the model does not generate",
)
def check_generate(subject: AdapterSubject) -> None:
    """Generation goes on from the shorter sequence, and is that of the model if all is kept."""
    model: Any = subject.model()
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        plain = model.generate(**subject.given(), **how)
        with subject.attached(model, ALL):
            all_kept = model.generate(**subject.given(), **how)
        with subject.attached(model, subject.keep) as run:
            fewer = model.generate(**subject.given(), **how)
            left = run.receipt.tokens_out < run.receipt.tokens_in
    if not torch.equal(plain, all_kept):
        fail("generates something else though all tokens are kept")
    if not left or fewer.shape != plain.shape:
        fail(f"generates {tuple(fewer.shape)} from the shorter sequence, not {tuple(plain.shape)}")


def _needing(signal: str) -> Reducer:
    """A registered strategy that reads a signal."""
    records = installed().strategies.values()
    name = next(record.name for record in records if signal in record.needs)
    return create_strategy(name, keep=5)


def _elsewhere(keep: int) -> Iterator[Stage]:
    """Stages at the sites that not every model has."""
    yield Stage(reducer=create_strategy("random", keep=keep), site="frames")
    yield Stage(reducer=create_strategy("tome", keep=keep), site="vision", layer=1)
    yield Stage(reducer=create_strategy("random", keep=keep), site="decoder", layer=1)


@dataclass
class _Seen:
    """What the first layer of an LLM was given."""

    states: Tensor
    positions: dict[str, Tensor]


def _first_layer(model: Any) -> Any | None:
    found = model
    while found is not None and not isinstance(getattr(found, "layers", None), nn.ModuleList):
        inner = found.get_decoder() if hasattr(found, "get_decoder") else None
        if inner is None or inner is found:
            inner = getattr(found, "model", None)
        found = inner
    return None if found is None else found.layers[0]


def _watched(subject: AdapterSubject) -> tuple[_Seen, _Seen, Tensor]:
    """What the first layer is given in full, what of the kept, and the columns that are left."""
    model = subject.model()
    full = _watch(subject, model)
    with subject.attached(model, subject.keep) as run:
        kept = _watch(subject, model)
        reductions = run.reductions
    left = torch.ones(full.states.shape[1], dtype=torch.bool)
    for item in reductions:
        left[item.columns] = False
        left[item.columns[item.kept]] = True
    return full, kept, left.nonzero()[:, 0]


def _watch(subject: AdapterSubject, model: nn.Module) -> _Seen:
    seen: list[_Seen] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        positions = {}
        for name in ("position_ids", "position_embeddings"):
            value = kwargs.get(name)
            parts = value if isinstance(value, tuple) else (value,)
            for index, part in enumerate(parts):
                if torch.is_tensor(part):
                    positions[f"{name} {index}"] = part.clone()
        seen.append(_Seen(states.clone(), positions))

    layer = _first_layer(model)
    if layer is None:
        fail("serves a model whose LLM has no layers to watch")
    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        subject.logits(model)
    finally:
        handle.remove()
    return seen[0]


def run_adapter_checks(
    adapter: str | type[Any],
    model: Callable[[], nn.Module],
    inputs: Callable[[], Mapping[str, Any]],
    expected_failures: Mapping[str, str] = NONE,
    **subject: Any,
) -> list[CheckResult]:
    """Run every check on a model adapter.

    Args:
        adapter: a registered name, or a class.
        model: makes a small model that it serves, in evaluation mode, the same each time.
        inputs: makes its inputs: one prompt with at least one visual item of more than five tokens.
        expected_failures: as for :func:`tokenreduce.testing.run_checks`.
        subject: further fields of :class:`AdapterSubject`: ``processor``, ``grids``, ``keep``.

    Raises:
        UnknownName: if nothing registered the adapter, or there is no such check.
        RegistrationError: if it is neither a name nor a class.
    """
    return _run_of(adapter, model, inputs, expected_failures, subject).all()


def parametrize_adapter_checks(
    adapter: str | type[Any],
    model: Callable[[], nn.Module],
    inputs: Callable[[], Mapping[str, Any]],
    expected_failures: Mapping[str, str] = NONE,
    **subject: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of every check of an adapter; see :func:`run_adapter_checks`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = parametrized(
        [_run_of(adapter, model, inputs, expected_failures, subject)]
    )
    return decorator


def _run_of(
    adapter: str | type[Any],
    model: Callable[[], nn.Module],
    inputs: Callable[[], Mapping[str, Any]],
    expected_failures: Mapping[str, str],
    subject: Mapping[str, Any],
) -> Run[AdapterSubject]:
    registered = isinstance(adapter, str)
    if isinstance(adapter, str):
        name, factory = adapter, installed().model_adapters.resolve(adapter)
    elif callable(adapter):
        name, factory = getattr(adapter, "__name__", repr(adapter)), adapter
    else:
        raise RegistrationError(f"a model adapter is a name or a class, got {adapter!r}.")
    checked = AdapterSubject(
        name=name, factory=factory, model=model, inputs=inputs, registered=registered, **subject
    )
    return Run(ADAPTER_CHECKS, checked, expected_failures, kind="model adapter")
