"""Writing a strategy: :class:`Scorer`, :class:`Selector`, :class:`Merger`, or plain ``reduce``.

The framework owns budgets, bucketing, gathering, weighted merging, ordering, protected tokens,
types and receipts. An author sees a dense batch of unprotected tokens of one layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from tokenreduce.budget import Budget
from tokenreduce.capabilities import COUNT_CLASSES, SITES, CountClass, StrategyRecord
from tokenreduce.errors import BudgetError, ReductionError, TokensError
from tokenreduce.ops.merging import MergeWeights
from tokenreduce.ops.selection import top_k_indices
from tokenreduce.plugins import installed
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenreduce.stream import TokenStream

BUDGET_FIELDS = ("keep", "keep_ratio", "reduction")


@dataclass(frozen=True, kw_only=True)
class Reducer(ABC):
    """A strategy: frozen configuration plus ``reduce``. Call the instance to run it.

    Args:
        keep: number of tokens to keep of each item.
        keep_ratio: share of the tokens to keep, in (0, 1].
        reduction: how many times fewer tokens.

    At most one of the three is given. Without one, an :attr:`adaptive` strategy decides by itself;
    any other waits for a budget from :meth:`with_budget`, a wrapper or an attachment.

    Raises:
        BudgetError: if several are given, or one is out of range.
    """

    keep: int | None = None
    keep_ratio: float | None = None
    reduction: float | None = None

    #: Whether the strategy can decide by itself how many tokens to keep.
    adaptive: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option, value in self.options().items():
            if isinstance(value, list):
                # Reducers are hashed: items of equal layout and reducer share a bucket.
                object.__setattr__(self, option, tuple(value))
        if self.budget is not None and self.budget.keep == 0 and "decoder" not in self.record.sites:
            raise BudgetError(
                f"{self.name}: keep=0 would leave the LLM nothing to see of the image. Keep at "
                "least one token; dropping all is legal only at the decoder site."
            )

    @cached_property
    def budget(self) -> Budget | None:
        """The budget of an item, or None if none was given."""
        given = {name: getattr(self, name) for name in BUDGET_FIELDS}
        if all(value is None for value in given.values()):
            return None
        return Budget(**given)

    @property
    def decides_alone(self) -> bool:
        """Whether the strategy, as configured, needs no budget."""
        return self.adaptive

    @property
    def from_step(self) -> int:
        """Denoising steps of a diffusion model that still see all tokens; 0 for all but schedules.

        A reducer sees no steps: this is data for whoever attaches it.
        """
        return 0

    def with_budget(
        self,
        *,
        keep: int | None = None,
        keep_ratio: float | None = None,
        reduction: float | None = None,
    ) -> Self:
        """The same strategy with another budget."""
        return replace(self, keep=keep, keep_ratio=keep_ratio, reduction=reduction)

    @cached_property
    def record(self) -> StrategyRecord:
        """The registration record.

        A class that nobody registered has that of its nearest registered ancestor under its own
        name, or else one with the defaults that allows every site.
        """
        registered = {record.target: record for record in installed().strategies.values()}
        own, *ancestors = (f"{c.__module__}:{c.__qualname__}" for c in type(self).__mro__)
        if own in registered:
            return registered[own]
        inherited = next((registered[a] for a in ancestors if a in registered), None)
        if inherited is None:
            inherited = StrategyRecord(
                name="",
                target=own,
                summary="",
                sites=SITES,
                kind="merge" if isinstance(self, Merger) else "prune",
                count="adaptive" if self.adaptive else "exact",
            )
        return replace(
            inherited,
            name=type(self).__name__,
            target=own,
            # What a subclass adds may read them.
            reads_features=inherited.reads_features or not inherited.wraps,
            summary=(type(self).__doc__ or "").partition("\n")[0],
            distribution="",
        )

    @property
    def name(self) -> str:
        """The registered name, or the name of the class."""
        return self.record.name

    def options(self) -> dict[str, Any]:
        """The fields other than the budget, as given to the constructor."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in BUDGET_FIELDS}

    def inner_reducers(self) -> Iterator[Reducer]:
        """The reducers that this one wraps."""
        for value in self.options().values():
            candidates = value if isinstance(value, tuple | list) else (value,)
            yield from (inner for inner in candidates if isinstance(inner, Reducer))

    @property
    def count_class(self) -> CountClass:
        """What the kept count follows from, for this configuration: the loosest of its parts."""
        parts = (self.record.count, *(inner.count_class for inner in self.inner_reducers()))
        return max(parts, key=COUNT_CLASSES.index)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that this strategy, or one that it wraps, reads."""
        inner = (name for reducer in self.inner_reducers() for name in reducer.needs)
        return tuple(dict.fromkeys([*self.record.needs, *inner]))

    @property
    def reads_features(self) -> bool:
        """Whether what this strategy, or one that it wraps, keeps depends on the features."""
        return self.record.reads_features or any(r.reads_features for r in self.inner_reducers())

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Load what the strategy needs on a device, once, before its first use.

        Most strategies need nothing. Everything else about a reducer is pure.
        """

    def count(self, tokens: int) -> int:
        """Tokens to keep of ``tokens`` unprotected ones.

        Raises:
            BudgetError: if the strategy was given no budget.
        """
        self.require_budget()
        return tokens if self.budget is None else self.budget.count(tokens)

    def require_budget(self) -> None:
        """Check that the strategy knows how many tokens to keep.

        Raises:
            BudgetError: if it was given no budget and does not decide by itself.
        """
        if self.budget is None and not self.decides_alone:
            raise BudgetError(
                f"{self.name} has no budget: give exactly one of keep=64, keep_ratio=0.0625 or "
                "reduction=16."
            )

    def __call__(self, tokens: VisualTokens) -> Reduction:
        """Reduce the unprotected tokens of a batch; protected ones survive outside the budget.

        Raises:
            BudgetError: if the strategy has no budget and does not decide by itself.
            TokensError: if the features hold NaN or infinity, or do not suit the strategy; of a
                strategy that does not read them, if what it keeps does.
            MissingSignal: if a needed signal is missing.
            ReductionError: if the strategy breaks its contract.
        """
        if not isinstance(tokens, VisualTokens):
            raise TokensError(
                f"{self.name} reduces VisualTokens, got {type(tokens).__name__}. Wrap features "
                "with VisualTokens.from_grid(features, (height, width))."
            )
        self.require_budget()
        if tokens.batch == 0:
            nothing = tokens.features.new_empty((0, self.count(tokens.count)), dtype=torch.long)
            return Reduction.from_kept(tokens, nothing)
        if self.budget is not None and self.budget.keep == 0:
            guarded = tokens.layout.protected.nonzero().squeeze(1).to(tokens.features.device)
            return Reduction.from_kept(tokens, guarded.expand(tokens.batch, -1))
        reason = self.reason_to_keep_all(tokens.count - tokens.layout.protected_count)
        if reason:
            return Reduction.identity(tokens, reason=reason)
        reads = self.reads_features
        if reads:
            self._require_finite(tokens.features)
        if tokens.has_sizes and not bool((tokens.sizes > 0).all() & tokens.sizes.isfinite().all()):
            raise TokensError(f"{self.name}: sizes must be positive and finite.")
        for name in self.needs:
            tokens.signal(name)
        if tokens.layout.protected_count == 0:
            reduction = self._reduce_free(tokens)
        else:
            reduction = self._reduce_free(tokens.select(tokens.layout.free))
            reduction = _reinstate_protected(tokens, reduction)
        if not reads:
            self._require_finite(reduction.features)
        return reduction

    def stream(
        self, *, budget: int, window: int | None = None, channels: int | None = None
    ) -> TokenStream:
        """Reduce a clip while its frames arrive; see :class:`tokenreduce.stream.TokenStream`.

        Args:
            budget: most tokens to hold; it replaces the reducer's own budget.
            window: tokens of memory for what is new; 16,384, or three budgets if that is more, if
                omitted.
            channels: how many of the features' first channels the strategy sees; all if omitted.
        """
        from tokenreduce.stream import TokenStream

        return TokenStream(self, budget=budget, window=window, channels=channels)

    def reason_to_keep_all(self, free: int) -> str:
        """Why an item of ``free`` unprotected tokens stays as it is; empty if it is reduced."""
        if free == 0:
            return "no unprotected tokens"
        if self.budget is not None and self.budget.count(free) >= free:
            return f"{free} tokens, within the budget ({self.budget})"
        return ""

    def _require_finite(self, features: Tensor) -> None:
        # A sum that is not finite may have overflowed: then every value is looked at.
        if not isfinite(features.detach().sum().item()) and not bool(features.isfinite().all()):
            raise TokensError(
                f"{self.name}: the features hold NaN or infinity (shape {tuple(features.shape)}, "
                f"type {features.dtype}). The encoder or projector overflowed; in float16 try "
                "bfloat16."
            )

    def _reduce_free(self, tokens: VisualTokens) -> Reduction:
        result = self.reduce(tokens)
        if not isinstance(result, Reduction):
            raise ReductionError(
                f"strategy {self.name!r} returned {type(result).__name__}, not a Reduction."
            )
        result.check(tokens, strategy=self.name)
        exact = self.budget is not None and self.count_class == "exact"
        if exact and result.kept != self.count(tokens.count):
            raise ReductionError(
                f"strategy {self.name!r} kept {result.kept} of {tokens.count} tokens, its budget "
                f"({self.budget}) says {self.count(tokens.count)}."
            )
        if result.kept == tokens.count and not result.reason:
            return replace(result, reason="the strategy chose to keep all")
        return result

    @abstractmethod
    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Reduce unprotected tokens of one layout.

        Args:
            tokens: ``(B, N, D)`` finite features, more of them than the budget, with the needed
                signals.
        """


class Scorer(Reducer):
    """Keeps the tokens of highest score; ties go to the lowest index."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """``(B, N)`` floating point: how much each token deserves to stay."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        scores = self.score(tokens)
        _check_shape(self, "scores", scores, (tokens.batch, tokens.count))
        kept = Reduction.from_kept(tokens, top_k_indices(scores, self.count(tokens.count)))
        return replace(kept, scores=scores)


class Selector(Reducer):
    """Keeps a set of tokens that it chooses jointly."""

    @abstractmethod
    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """``(B, k)`` distinct indices of the tokens to keep, in any order."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        k = self.count(tokens.count)
        kept = self.select(tokens, k)
        _check_shape(self, "indices", kept, (tokens.batch, k))
        return Reduction.from_kept(tokens, kept)


class Grouping(NamedTuple):
    """Groups of tokens, for mergers that say more than who belongs together.

    Attributes:
        groups: ``(B, N)`` group of each token in [0, k), -1 for dropped ones.
        positions: ``(B, k)`` the token at whose place each group stands; its first member if None.
        weights: ``(B, N)`` weight of each token in its group's mean; its size if None.
        scores: ``(B, N)`` how much each token deserved to stay, NaN for those that were not asked
            about; None if tokens are not ranked. A stream hands them back with what it holds.
    """

    groups: Tensor
    positions: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None


class Merger(Reducer):
    """Merges groups of tokens into their weighted means."""

    @abstractmethod
    def assign(self, tokens: VisualTokens, k: int) -> Tensor | Grouping:
        """Group of each token, ``(B, N)`` in [0, k) or -1 for dropped; or a :class:`Grouping`."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        k = self.count(tokens.count)
        assigned = self.assign(tokens, k)
        grouping = assigned if isinstance(assigned, Grouping) else Grouping(assigned)
        _check_shape(self, "groups", grouping.groups, (tokens.batch, tokens.count))
        merged = Reduction.from_groups(
            tokens,
            grouping.groups,
            k,
            positions=grouping.positions,
            weights=grouping.weights,
        )
        return replace(merged, scores=grouping.scores)


def _check_shape(reducer: Reducer, what: str, tensor: object, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ReductionError(
            f"strategy {reducer.name!r} returned {type(tensor).__name__} for {what}, not a tensor."
        )
    if tuple(tensor.shape) != shape:
        raise ReductionError(
            f"strategy {reducer.name!r} returned {what} of shape {tuple(tensor.shape)}, "
            f"expected {shape}."
        )


def _reinstate_protected(tokens: VisualTokens, inner: Reduction) -> Reduction:
    """The reduction of the unprotected tokens, with the protected ones put back in their places."""
    device = tokens.features.device
    free = tokens.layout.free.to(device)
    guarded = tokens.layout.protected.nonzero().squeeze(1).to(device).expand(tokens.batch, -1)
    positions = torch.cat([free[inner.positions], guarded], dim=1)
    order = positions.argsort(dim=1)
    rank = order.argsort(dim=1)
    assignment = rank.new_full((tokens.batch, tokens.count), DROPPED)
    moved = rank.gather(1, inner.assignment.clamp(min=0))
    assignment[:, free] = torch.where(inner.assignment < 0, DROPPED, moved)
    own = rank[:, inner.kept :]
    assignment.scatter_(1, guarded, own)
    weights = None
    if inner.weights is not None:
        weights = MergeWeights(
            torch.cat([rank.gather(1, inner.weights.output), own], dim=1),
            torch.cat([free[inner.weights.source], guarded], dim=1),
            torch.cat([inner.weights.value, torch.ones_like(own, dtype=torch.float32)], dim=1),
        )
    synthetic = None
    if inner.synthetic is not None:
        flags = torch.cat([inner.synthetic, torch.zeros_like(guarded, dtype=torch.bool)], dim=1)
        synthetic = flags.gather(1, order)
    scores = None
    if inner.scores is not None:
        scores = inner.scores.new_full((tokens.batch, tokens.count), torch.nan)
        scores[:, free] = inner.scores
    batch = torch.arange(tokens.batch, device=device)[:, None]
    features = torch.cat([inner.features, tokens.values[batch, guarded]], dim=1)
    return Reduction(
        features=features[batch, order],
        positions=positions.gather(1, order),
        assignment=assignment,
        weights=weights,
        synthetic=synthetic,
        reason=inner.reason,
        scores=scores,
    )
