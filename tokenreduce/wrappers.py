"""Reducers that take reducers, so that video and tiling are not built into every strategy."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, PipelineError, ReductionError
from tokenreduce.ops.merging import MergeWeights
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import Layout, VisualTokens

#: Tokens of groups that are copied at once, over all items of a batch.
COPIED_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class GroupWise(Reducer):
    """Applies a reducer to each group of an item's tokens.

    The budget is that of the whole item and is shared among the groups in proportion to their
    tokens; or it is left to ``inner``, whose own budget then holds for each group.

    Args:
        inner: the reducer to apply.

    Raises:
        BudgetError: if both the wrapper and ``inner`` are given a budget.
    """

    inner: Reducer

    def __post_init__(self) -> None:
        _require_reducers(self.inner)
        super().__post_init__()
        if self.budget is not None and self.inner.budget is not None:
            raise BudgetError(
                f"two budgets at once: {self.name} has {self.budget}, its inner "
                f"{self.inner.name} has {self.inner.budget}. Give one of them."
            )

    @property
    def decides_alone(self) -> bool:
        return self.inner.budget is not None or self.inner.decides_alone

    def require_budget(self) -> None:
        if self.budget is None:
            self.inner.require_budget()

    @abstractmethod
    def group_of(self, coords: Tensor) -> Tensor:
        """``(N,)`` group of each token, from its ``(N, 4)`` coordinates (block, t, y, x)."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        labels = self.group_of(tokens.layout.coords)
        order = labels.argsort(stable=True)
        counts = labels[order].unique_consecutive(return_counts=True)[1].tolist()
        return _reduce_groups(tokens, list(order.split(counts)), self._reducers(counts))

    def _reducers(self, counts: list[int]) -> list[Reducer]:
        if self.budget is None:
            return [self.inner] * len(counts)
        keep = self.count(sum(counts))
        if keep < len(counts):
            raise BudgetError(
                f"{self.name}: {keep} tokens cannot be shared among {len(counts)} groups, which "
                "keep at least one each. Raise the budget, or use a strategy that sees the whole "
                "item."
            )
        shares = Budget(total=keep).shares(counts)
        return [self.inner.with_budget(keep=share) for share in shares]


@dataclass(frozen=True, kw_only=True)
class PerFrame(GroupWise):
    """Applies an image strategy to each frame of each block."""

    def group_of(self, coords: Tensor) -> Tensor:
        return coords[:, 0] * (int(coords[:, 1].max()) + 1) + coords[:, 1]


@dataclass(frozen=True, kw_only=True)
class PerTile(GroupWise):
    """Applies a strategy to each tile or crop."""

    def group_of(self, coords: Tensor) -> Tensor:
        return coords[:, 0]


@dataclass(frozen=True, kw_only=True)
class PerSegment(GroupWise):
    """Applies a video strategy to each run of ``frames`` consecutive frames.

    Args:
        frames: length of a segment in frames, at least 1; the last may be shorter.
    """

    frames: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 1:
            raise PipelineError(f"{self.name}: frames={self.frames} must be at least 1.")

    def group_of(self, coords: Tensor) -> Tensor:
        segment = coords[:, 1] // self.frames
        return coords[:, 0] * (int(segment.max()) + 1) + segment


@dataclass(frozen=True, kw_only=True)
class Chain(Reducer):
    """Applies reducers one after another, each with its own budget.

    Args:
        reducers: at least one; each budget is of the tokens that the one before left.
    """

    reducers: tuple[Reducer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "reducers", tuple(self.reducers))
        _require_reducers(*self.reducers)
        if not self.reducers:
            raise PipelineError("a chain needs at least one reducer.")
        if any(getattr(self, name) is not None for name in BUDGET_FIELDS):
            raise BudgetError("a chain has no budget of its own: give one to each of its reducers.")

    @property
    def decides_alone(self) -> bool:
        return True

    def require_budget(self) -> None:
        for reducer in self.reducers:
            reducer.require_budget()

    def reduce(self, tokens: VisualTokens) -> Reduction:
        results = [chain_item(tokens.item(b), self.reducers) for b in range(tokens.batch)]
        return _stack(results, strategy=self.name)


def per_frame(inner: Reducer, **budget: float) -> PerFrame:
    """Apply an image strategy to each frame; ``budget`` is of the whole item."""
    return PerFrame(inner=inner, **budget)  # type: ignore[arg-type]


def per_tile(inner: Reducer, **budget: float) -> PerTile:
    """Apply a strategy to each tile; ``budget`` is of the whole item."""
    return PerTile(inner=inner, **budget)  # type: ignore[arg-type]


def per_segment(inner: Reducer, frames: int = 8, **budget: float) -> PerSegment:
    """Apply a video strategy to each run of frames; ``budget`` is of the whole item."""
    return PerSegment(inner=inner, frames=frames, **budget)  # type: ignore[arg-type]


def chain(*reducers: Reducer) -> Chain:
    """Apply reducers one after another."""
    return Chain(reducers=reducers)


def chain_item(item: VisualTokens, reducers: tuple[Reducer, ...]) -> Reduction:
    """Apply reducers one after another to a batch of one."""
    first, *rest = reducers
    result = first(item)
    for reducer in rest:
        (item,) = result.tokens(item) if result is not None else (item,)
        following = reducer(item)
        result = result.then(following)
    return result


def _require_reducers(*inner: object) -> None:
    for each in inner:
        if not isinstance(each, Reducer):
            raise PipelineError(
                f"a wrapper takes reducers, got {each!r}. Create one with "
                "tokenreduce.create_strategy(name)."
            )


def _relative(layout: Layout) -> Layout:
    """The same layout, counted from its own first block and frame, so that groups share buckets."""
    origin = layout.coords.amin(0)
    origin[2:] = 0
    return Layout(layout.coords - origin, layout.protected)


def _reduce_groups(
    tokens: VisualTokens, members: list[Tensor], reducers: list[Reducer]
) -> Reduction:
    """Reduce groups of a batch, bucketed, and put the outputs back in source order.

    Tokens are copied for a number of groups at a time, not for all of them.
    """
    batch = tokens.batch
    parts: list[list[Reduction]] = [[] for _ in range(batch)]
    runs = _runs([batch * len(m) for m in members])
    for run in runs:
        items = [_group(tokens, m) for m in members[run]]
        packed = PackedTokens.from_items([item.item(b) for b in range(batch) for item in items])
        reductions = reduce_packed(packed, reducers[run] * batch)
        if len(runs) > 1:
            # A view of what it was made from would keep that alive.
            reductions = [replace(each, features=each.features.clone()) for each in reductions]
        for b, part in enumerate(parts):
            part += reductions[b * len(items) : (b + 1) * len(items)]
    index = [m.to(tokens.features.device) for m in members]
    return _stack([_join(tokens, index, part) for part in parts], strategy="group-wise")


def _runs(counts: list[int]) -> list[slice]:
    """Runs of groups that hold no more than :data:`COPIED_TOKENS`, or one group."""
    starts, held = [0], 0
    for group, count in enumerate(counts):
        if held and held + count > COPIED_TOKENS:
            starts.append(group)
            held = 0
        held += count
    return [slice(*ends) for ends in pairwise([*starts, len(counts)])]


def _group(tokens: VisualTokens, members: Tensor) -> VisualTokens:
    part = tokens.select(members)
    return VisualTokens(
        part.features, _relative(part.layout), sizes=part.sizes, signals=part.signals
    )


def _join(tokens: VisualTokens, index: list[Tensor], parts: list[Reduction]) -> Reduction:
    """One item's reduction from those of its groups."""
    positions = torch.cat([m[part.positions[0]] for m, part in zip(index, parts, strict=True)])
    order = positions.argsort()
    rank = order.argsort()
    assignment = rank.new_full((tokens.count,), DROPPED)
    edges: list[MergeWeights] = []
    merged = any(part.weights is not None for part in parts)
    features = tokens.features.new_empty(len(order), tokens.features.shape[2])
    start = 0
    for m, part in zip(index, parts, strict=True):
        own = rank[start : start + part.kept]
        features[own] = part.features[0]
        flowed = part.assignment[0]
        assignment[m] = torch.where(flowed < 0, DROPPED, own[flowed.clamp(min=0)])
        if merged:
            weights = part.weights if part.weights is not None else part._selection()
            edges.append(
                MergeWeights(own[weights.output[0]], m[weights.source[0]], weights.value[0])
            )
        start += part.kept
    synthetic = None
    if any(part.synthetic is not None for part in parts):
        flags = [
            part.synthetic[0]
            if part.synthetic is not None
            else torch.zeros_like(part.positions[0], dtype=torch.bool)
            for part in parts
        ]
        synthetic = torch.cat(flags)[order][None]
    return Reduction(
        features=features[None],
        positions=positions[order][None],
        assignment=assignment[None],
        weights=MergeWeights(
            *(torch.cat([edge[axis] for edge in edges])[None] for axis in range(3))
        )
        if merged
        else None,
        synthetic=synthetic,
    )


def _stack(items: list[Reduction], *, strategy: str) -> Reduction:
    """Reductions of single items as one of a batch."""
    kept = {item.kept for item in items}
    if len(kept) > 1:
        raise ReductionError(
            f"{strategy}: the items of this batch keep different counts ({sorted(kept)}), which a "
            "dense batch cannot hold. Pass them one by one, or pack them with reduce_packed."
        )
    if len(items) == 1:
        return items[0]
    merged = any(item.weights is not None for item in items)
    weights = None
    if merged:
        edges = [item.weights if item.weights is not None else item._selection() for item in items]
        widest = max(edge.value.shape[1] for edge in edges)
        padded = [
            [torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in edge]
            for edge in edges
        ]
        weights = MergeWeights(*(torch.cat([edge[axis] for edge in padded]) for axis in range(3)))
    synthetic = None
    if any(item.synthetic is not None for item in items):
        synthetic = torch.cat(
            [
                item.synthetic
                if item.synthetic is not None
                else torch.zeros_like(item.positions, dtype=torch.bool)
                for item in items
            ]
        )
    return replace(
        items[0],
        features=torch.cat([item.features for item in items]),
        positions=torch.cat([item.positions for item in items]),
        assignment=torch.cat([item.assignment for item in items]),
        weights=weights,
        synthetic=synthetic,
    )
