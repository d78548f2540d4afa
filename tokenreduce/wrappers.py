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
class Wrapper(Reducer):
    """A reducer that applies another one; the budget is its own or left to the other.

    Args:
        inner: the reducer to apply.

    Raises:
        BudgetError: if both the wrapper and ``inner`` are given a budget.
        PipelineError: if ``inner`` is no reducer, or acts from a denoising step on.
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


@dataclass(frozen=True, kw_only=True)
class GroupWise(Wrapper):
    """Applies a reducer to each group of an item's tokens.

    The budget is that of the whole item and is shared among the groups in proportion to their
    tokens; or it is left to ``inner``, whose own budget then holds for each group.
    """

    @abstractmethod
    def group_of(self, coords: Tensor) -> Tensor:
        """``(N,)`` group of each token, from its ``(N, 4)`` coordinates (block, t, y, x)."""

    def reduce(self, tokens: VisualTokens) -> Reduction:
        members = self.groups(tokens.layout)
        return _reduce_groups(tokens, members, self.reducers_of([len(part) for part in members]))

    def groups(self, layout: Layout) -> list[Tensor]:
        """Indices of the tokens of each group, ascending."""
        labels = self.group_of(layout.coords)
        order = labels.argsort(stable=True)
        counts = labels[order].unique_consecutive(return_counts=True)[1].tolist()
        return list(order.split(counts))

    def reducers_of(self, counts: list[int]) -> list[Reducer]:
        """The reducer of each group, with its share of the budget.

        Args:
            counts: tokens of each group.

        Raises:
            BudgetError: if the budget holds less than one token for each.
        """
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
    result = step = first(item)
    for reducer in rest:
        (item,) = step.tokens(item)
        step = reducer(item)
        result = result.then(step)
    return result


def _require_reducers(*inner: object) -> None:
    for each in inner:
        if not isinstance(each, Reducer):
            raise PipelineError(
                f"a wrapper takes reducers, got {each!r}. Create one with "
                "tokenreduce.create_strategy(name)."
            )
        if each.from_step:
            raise PipelineError(
                f"{each.name} inside a wrapper: from which denoising step tokens are reduced holds "
                f"for a whole stage. Let {each.name} wrap the others."
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
    batch, device = tokens.batch, tokens.features.device
    room = sum(map(_most, members, reducers))
    wholes = [_Whole(tokens.features[b], room) for b in range(batch)]
    index = [m.to(device) for m in members]
    for run in _runs([batch * len(m) for m in members]):
        items = [_group(tokens, m) for m in members[run]]
        packed = PackedTokens.from_items([item.item(b) for b in range(batch) for item in items])
        reductions = reduce_packed(packed, reducers[run] * batch)
        for i, part in enumerate(reductions):
            b, group = divmod(i, len(items))
            wholes[b].add(index[run][group], part)
    return _stack([whole.reduction() for whole in wholes], strategy="group-wise")


def _most(members: Tensor, reducer: Reducer) -> int:
    """The most tokens that a group may keep."""
    exact = reducer.budget is not None and reducer.count_class == "exact"
    return reducer.count(len(members)) if exact else len(members)


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


class _Whole:
    """One item's reduction, written group by group into memory set aside at the start.

    Small tensors that outlived the large ones of their run would leave holes between these, and
    the heap would grow with the number of runs.

    Args:
        features: ``(N, D)`` of the item.
        room: the most tokens that all groups may keep.
    """

    def __init__(self, features: Tensor, room: int) -> None:
        count = len(features)
        self.features = features.new_empty(room, features.shape[1])
        self.positions = torch.empty(room, dtype=torch.long, device=features.device)
        self.assignment = torch.full((count,), DROPPED, device=features.device)
        self.synthetic = torch.zeros(room, dtype=torch.bool, device=features.device)
        whole = torch.empty(2, count, dtype=torch.long, device=features.device)
        value = features.new_empty(count, dtype=torch.float32)
        self.edges = MergeWeights(whole[0], whole[1], value)
        self.kept = self.edge_count = 0
        self.merged = self.has_synthetic = False

    def add(self, members: Tensor, part: Reduction) -> None:
        """Write the reduction of the tokens at ``members``."""
        own = slice(self.kept, self.kept + part.kept)
        self.features[own] = part.features[0]
        self.positions[own] = members[part.positions[0]]
        flowed = part.assignment[0]
        self.assignment[members] = torch.where(flowed < 0, DROPPED, flowed + self.kept)
        if part.synthetic is not None:
            self.synthetic[own] = part.synthetic[0]
            self.has_synthetic = True
        self.merged |= part.weights is not None
        weights = part.weights if part.weights is not None else part._selection()
        self._add_edges(weights.output[0] + self.kept, members[weights.source[0]], weights.value[0])
        self.kept += part.kept

    def _add_edges(self, *edges: Tensor) -> None:
        stop = self.edge_count + len(edges[0])
        if stop > len(self.edges.value):
            # Soft merges have more edges than tokens.
            self.edges = MergeWeights(
                *(torch.cat([old, old.new_empty(stop)]) for old in self.edges)
            )
        for column, new in zip(self.edges, edges, strict=True):
            column[self.edge_count : stop] = new
        self.edge_count = stop

    def reduction(self) -> Reduction:
        """The outputs in source order."""
        features, positions = self.features[: self.kept], self.positions[: self.kept]
        synthetic, assignment = self.synthetic[: self.kept], self.assignment
        output, source, value = (column[: self.edge_count] for column in self.edges)
        if bool((positions.diff() < 0).any()):
            order = positions.argsort()
            rank = order.argsort()
            features, positions, synthetic = features[order], positions[order], synthetic[order]
            assignment = torch.where(assignment < 0, DROPPED, rank[assignment.clamp(min=0)])
            output = rank[output]
        weights = MergeWeights(output[None], source[None], value[None]) if self.merged else None
        return Reduction(
            features=features[None],
            positions=positions[None],
            assignment=assignment[None],
            weights=weights,
            synthetic=synthetic[None] if self.has_synthetic else None,
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
