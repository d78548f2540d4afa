"""What is checked: a strategy, given by name, class, instance or factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.api import create_strategy, strategy_info
from tokenreduce.budget import Budget
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.errors import BudgetError, RegistrationError
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.testing.check import Problem as Problem
from tokenreduce.tokens import Layout, VisualTokens

#: A registered name, a class, an instance, or a function from a budget to an instance.
StrategyLike = str | type[Reducer] | Reducer | Callable[..., Reducer]

#: Words of a synthetic prompt, and channels of synthetic features.
PROMPT, CHANNELS = 5, 16


@dataclasses.dataclass(frozen=True)
class Subject:
    """A strategy under test, with the inputs that suit it.

    Attributes:
        name: what to call it.
        record: its registration record.
        factory: from a budget (``keep``, ``keep_ratio`` or ``reduction``) to an instance.
        registered: whether it was given by its registered name.
        excused: names of checks that are expected to fail; other checks do not insist on them.
    """

    name: str
    record: StrategyRecord
    factory: Callable[..., Reducer]
    registered: bool = False
    excused: frozenset[str] = frozenset()

    @classmethod
    def of(cls, strategy: StrategyLike) -> Subject:
        """Whatever :func:`~tokenreduce.testing.run_checks` accepts.

        Raises:
            UnknownName: if nothing registered the name.
            RegistrationError: if it is nothing of the sort, or a wrapper of unknown shape.
        """
        if isinstance(strategy, str):
            record = strategy_info(strategy)
            if record.needs_weights:
                raise RegistrationError(
                    f"strategy {strategy!r} needs weights from a file: give a function from a "
                    "budget to an instance that names one."
                )
            if record.wraps:
                cls_ = installed().strategies.resolve(strategy)
                return cls(strategy, record, _wrapper_factory(cls_), registered=True)
            return cls(strategy, record, lambda **budget: create_strategy(strategy, **budget), True)
        if isinstance(strategy, Reducer):
            return cls(strategy.name, strategy.record, strategy.with_budget)
        if not callable(strategy):
            raise RegistrationError(
                f"a strategy is a name, a class, an instance or a function, got {strategy!r}."
            )
        try:
            example = strategy()
        except TypeError as error:
            raise RegistrationError(
                f"{strategy!r} could not be created from a budget alone ({error}): give a function "
                "from a budget to an instance."
            ) from error
        return cls(example.name, example.record, strategy)

    @property
    def takes_budget(self) -> bool:
        """Whether the strategy can be told how many tokens to keep."""
        try:
            self.factory(keep=1)
        except BudgetError:
            return False
        return True

    @property
    def may_drop_all(self) -> bool:
        """Whether no token at all may be left."""
        return self.record.sites == ("decoder",)

    def create(self, **budget: Any) -> Reducer:
        """An instance with a budget, if it takes one, prepared for the CPU."""
        reducer = self.factory(**budget) if self.takes_budget else self.factory()
        reducer.prepare(torch.device("cpu"), torch.float32)
        return reducer

    def problem(self, reduction: Reduction, tokens: VisualTokens) -> str:
        """What is wrong with a reduction, except for what is excused; empty if nothing is."""
        found = shape_problem(reduction, tokens, may_be_empty=self.may_drop_all)
        found = found or position_problem(reduction, tokens.count)
        if not found and "assignment" not in self.excused:
            found = assignment_problem(reduction)
        if not found and "features" not in self.excused:
            found = feature_problem(reduction, tokens)
        return found

    def keep_range(self, tokens: int, **budget: Any) -> range:
        """The counts that a strategy of this class may keep of ``tokens`` unprotected ones."""
        if not self.takes_budget:
            return range(0 if self.may_drop_all else 1, tokens + 1)
        wanted = Budget(**budget).count(tokens)
        return range(wanted if self.record.count == "exact" else 1, wanted + 1)

    def image(self, *grid: int, seed: int = 0, batch: int = 1) -> VisualTokens:
        """An image (h, w) or clip (t, h, w) of random features and the needed signals."""
        return self.tokens(Layout.from_grid(grid), seed=seed, batch=batch)

    def layouts(self) -> dict[str, Layout]:
        """Layouts that the strategy must serve, by name."""
        layouts = {
            "image": Layout.from_grid((5, 7)),
            "clip": Layout.from_grid((3, 4, 4)),
            "wide image": Layout.from_grid((2, 12)),
            "row": Layout.line(11),
        }
        if not self.record.needs_grid:
            layouts["tiles"] = tiles()
            layouts["what an earlier stage left"] = thinned()
        return layouts

    def tokens(
        self, layout: Layout, *, seed: int = 0, batch: int = 1, channels: int = CHANNELS
    ) -> VisualTokens:
        """Random tokens of a layout, each item its own draw, with the needed signals."""
        generator = torch.Generator().manual_seed(1000 + seed)
        shape = (batch, len(layout))
        # Neighbours resemble each other, as in an image; some energy is shared by all.
        drift = torch.randn(*shape, channels, generator=generator).cumsum(1) / 3
        noise = torch.randn(*shape, channels, generator=generator)
        features = drift + noise + torch.randn(1, 1, channels, generator=generator)
        signals = {name: _signal(name, shape, channels, generator) for name in self.needs}
        return VisualTokens(features, layout, signals=signals)

    def with_all_signals(self, tokens: VisualTokens) -> VisualTokens:
        """The same tokens with every signal that the record does not declare."""
        generator = torch.Generator().manual_seed(7)
        shape = (tokens.batch, tokens.count)
        names = (name for name in installed().signals if name not in self.record.uses)
        signals = {name: _signal(name, shape, CHANNELS, generator) for name in names}
        return VisualTokens(
            tokens.features, tokens.layout, signals={**signals, **dict(tokens.signals)}
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that the record declares."""
        return self.record.needs


def cast(tokens: VisualTokens, dtype: torch.dtype, scale: float = 1.0) -> VisualTokens:
    """The same tokens and signals in another type, with features of another scale."""
    signals = {name: signal.to(dtype) for name, signal in tokens.signals.items()}
    return VisualTokens((tokens.features * scale).to(dtype), tokens.layout, signals=signals)


def tiles() -> Layout:
    """A thumbnail of 3 x 3 tokens and two tiles of 4 x 3."""
    parts = [
        Layout.from_grid((3, 3), block=0),
        Layout.from_grid((4, 3), block=1),
        Layout.from_grid((4, 3), block=2),
    ]
    return Layout(torch.cat([part.coords for part in parts]))


def thinned() -> Layout:
    """A clip of 3 x 4 x 4 tokens without every third."""
    index = torch.arange(48)
    return Layout.from_grid((3, 4, 4)).select(index[index % 3 != 1])


def with_markers(layout: Layout, grid: tuple[int, int]) -> Layout:
    """An image with a protected class token in front and a protected newline after each row."""
    h, w = grid
    rows = layout.coords.reshape(h, w, 4)
    newline = torch.stack([torch.tensor([0, 0, y, w]) for y in range(h)])[:, None]
    coords = torch.cat([rows, newline], dim=1).reshape(-1, 4)
    coords = torch.cat([torch.zeros(1, 4, dtype=torch.long), coords])
    protected = torch.cat([torch.tensor([True]), (torch.arange(h * (w + 1)) + 1) % (w + 1) == 0])
    return Layout(coords, protected)


def shape_problem(reduction: Reduction, tokens: VisualTokens, *, may_be_empty: bool = False) -> str:
    """Shapes, types and devices."""
    b, n, d = tokens.features.shape
    if not isinstance(reduction, Reduction):
        return f"returned {type(reduction).__name__}, expected a Reduction"
    m = reduction.positions.shape[-1]
    for name, tensor, shape in (
        ("features", reduction.features, (b, m, d)),
        ("positions", reduction.positions, (b, m)),
        ("assignment", reduction.assignment, (b, n)),
        ("synthetic", reduction.synthetic, (b, m)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"returned {name} of shape {tuple(tensor.shape)}, expected {shape}"
        if tensor.device != tokens.features.device:
            return (
                f"returned {name} on {tensor.device}, the features are on {tokens.features.device}"
            )
    for name in ("positions", "assignment"):
        if getattr(reduction, name).dtype != torch.long:
            return f"returned {name} of type {getattr(reduction, name).dtype}, expected int64"
    if m == 0 and not may_be_empty:
        return "kept nothing, expected at least one token"
    return ""


def position_problem(reduction: Reduction, count: int) -> str:
    """Positions are unique, ascending and in range."""
    positions = reduction.positions
    if positions.numel() == 0:
        return ""
    if int(positions.min()) < 0 or int(positions.max()) >= count:
        return (
            f"returned positions in [{int(positions.min())}, {int(positions.max())}], expected "
            f"source indices in [0, {count})"
        )
    if bool((positions.diff(dim=1) <= 0).any()):
        return f"returned positions that are not unique and ascending: {positions[0].tolist()}"
    return ""


def assignment_problem(reduction: Reduction) -> str:
    """Every token goes to an output or is dropped, and outputs own their positions."""
    assignment, m = reduction.assignment, reduction.kept
    if int(assignment.min()) < -1 or int(assignment.max()) >= m:
        return (
            f"returned assignments in [{int(assignment.min())}, {int(assignment.max())}], expected "
            f"outputs in [0, {m}), or -1 for dropped tokens"
        )
    own = assignment.gather(1, reduction.positions)
    wrong = own != torch.arange(m)
    if reduction.synthetic is not None:
        wrong &= ~reduction.synthetic
    if bool(wrong.any()):
        b, output = (int(i) for i in wrong.nonzero()[0])
        return (
            f"places output {output} at token {int(reduction.positions[b, output])}, but assigns "
            f"that token to {int(own[b, output])}"
        )
    return ""


def feature_problem(reduction: Reduction, tokens: VisualTokens) -> str:
    """Features are what positions and weights say they are made of."""
    made = reduction.apply(tokens.features)
    if same(reduction.features, made):
        return ""
    worst = float((reduction.features.float() - made.float()).abs().max())
    return (
        "returned features that differ from what its positions and weights make of the source "
        f"features (by up to {worst:.3g}); apply() would reduce other per-token tensors wrongly"
    )


def same(one: Tensor, other: Tensor) -> bool:
    """Equal up to a few units in the last place of the type."""
    tolerance = 32 * torch.finfo(one.dtype).eps
    scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * scale)


def equal_reductions(one: Reduction, other: Reduction) -> str:
    """How two reductions of the same tokens differ; empty if they do not."""
    if one.kept != other.kept:
        return f"kept {one.kept} tokens, then {other.kept}"
    for name in ("positions", "assignment"):
        if not torch.equal(getattr(one, name), getattr(other, name)):
            return f"returned different {name}"
    if not same(one.features, other.features):
        return "returned different features"
    return ""


def _signal(name: str, shape: tuple[int, int], channels: int, generator: torch.Generator) -> Tensor:
    """A signal of the dimensions that the vocabulary states, beside features of ``channels``."""
    batch, n = shape
    # What lives in the space of the LLM, as the features do, has as many channels; others less.
    own = name in ("prompt_embeddings", "prompt_states")
    width = channels if own else channels * 3 // 4
    sizes = {"batch": batch, "tokens": n, "prompt": PROMPT, "channels": width}
    record = installed().signals[name]
    dims = record.dims
    values = torch.randn(*(sizes.get(dim, 4) for dim in dims), generator=generator)
    # What has no channels is an attention map: positive, and it sums to one over the tokens.
    return values.softmax(dim=1) if record.per_token and "channels" not in dims else values


def _wrapper_factory(wrapper: type[Reducer]) -> Callable[..., Reducer]:
    """How to build a wrapper around the plainest strategy."""
    for field in dataclasses.fields(wrapper):
        if not str(field.type).startswith(("Reducer", "tuple[Reducer", "Sequence[Reducer")):
            continue
        many, name = str(field.type) != "Reducer", field.name

        def around(name: str = name, many: bool = many, **budget: Any) -> Reducer:
            options: dict[str, Reducer | Sequence[Reducer]]
            if many:
                # Several have no budget in common, so each has its own.
                return wrapper(**{name: (create_strategy("norm-topk", **budget),)})  # type: ignore[arg-type]
            options = {name: create_strategy("norm-topk")}
            return wrapper(**options, **budget)  # type: ignore[arg-type]

        return around
    raise RegistrationError(
        f"strategy {wrapper.__name__}: registered with wraps=True, but no field is a Reducer or a "
        "tuple of Reducers."
    )
