"""What became of each token: the result of a reducer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tokenreduce.errors import PositionsError, ReductionError
from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.merging import MergeWeights, compose, group_weights, merge_tokens
from tokenreduce.plugins import installed
from tokenreduce.tokens import VisualTokens

DROPPED = -1


@dataclass(frozen=True, kw_only=True, repr=False)
class Reduction:
    """Fewer tokens, with a record of what became of each source token.

    Attributes:
        features: ``(B, M, D)`` the outputs.
        positions: ``(B, M)`` the source index that each output stands at, unique and ascending, so
            that the order of rotary positions holds.
        assignment: ``(B, N)`` the output that each source token chiefly flowed into, -1 dropped.
        weights: how outputs are made of source tokens; None where every output *is* the token at
            its position (pruning).
        synthetic: ``(B, M)`` outputs that stand for no single token; None if there are none.
        reason: why nothing was reduced, or an empty string.
        scores: ``(B, N)`` how much each source token deserved to stay, in the strategy's own terms,
            NaN for those that it was not asked about; None where it ranks no tokens.
        verified: the positions that :meth:`from_kept` found to be in order, so that :meth:`check`
            does not wait for the device a second time.
    """

    features: Tensor
    positions: Tensor
    assignment: Tensor
    weights: MergeWeights | None = None
    synthetic: Tensor | None = None
    reason: str = ""
    scores: Tensor | None = None
    verified: Tensor | None = field(default=None, compare=False)

    @classmethod
    def identity(cls, tokens: VisualTokens, *, reason: str) -> Reduction:
        """Every token as it is, with the reason."""
        everyone = torch.arange(tokens.count, device=tokens.features.device)
        everyone = everyone.expand(tokens.batch, -1)
        return cls(features=tokens.values, positions=everyone, assignment=everyone, reason=reason)

    @classmethod
    def from_kept(cls, tokens: VisualTokens, kept: Tensor) -> Reduction:
        """Keep the tokens at ``kept`` and drop the rest.

        Args:
            tokens: the source tokens.
            kept: ``(B, M)`` distinct indices in any order.
        """
        positions = kept.sort(-1).values
        if not _ascending(positions, tokens.count):
            raise PositionsError(
                f"kept indices must be distinct and lie in [0, {tokens.count}), got {kept!r}."
            )
        assignment = positions.new_full((tokens.batch, tokens.count), DROPPED)
        ranks = torch.arange(positions.shape[1], device=positions.device)
        assignment.scatter_(1, positions, ranks.expand_as(positions))
        return cls(
            features=gather_tokens(tokens.values, positions),
            positions=positions,
            assignment=assignment,
            verified=positions,
        )

    @classmethod
    def from_groups(
        cls,
        tokens: VisualTokens,
        groups: Tensor,
        count: int,
        *,
        positions: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Reduction:
        """Merge each group of tokens into its weighted mean.

        Args:
            tokens: the source tokens.
            groups: ``(B, N)`` group of each token in [0, count), -1 for dropped ones; no group is
                empty.
            count: number of groups, M.
            positions: ``(B, M)`` where each group stands; its first member if omitted.
            weights: ``(B, N)`` weight of each token in its group; its size if omitted.
        """
        n = tokens.count
        if groups.is_floating_point() or bool(((groups < DROPPED) | (groups >= count)).any()):
            raise ReductionError(
                f"groups must be whole numbers in [0, {count}), or -1 for dropped tokens."
            )
        if positions is None:
            index = torch.arange(n, device=groups.device).expand_as(groups)
            positions = groups.new_full((tokens.batch, count + 1), n)
            # Dropped tokens are sent to a spare last column.
            positions = positions.scatter_reduce(
                1, groups.masked_fill(groups < 0, count), index, "amin"
            )[:, :count]
        order = positions.argsort(-1)
        rank = order.argsort(-1)
        groups = torch.where(groups < 0, DROPPED, rank.gather(1, groups.clamp(min=0)))
        merge = group_weights(groups, tokens.sizes if weights is None else weights, count)
        return cls(
            features=merge_tokens(tokens.values, merge, count),
            positions=positions.gather(1, order),
            assignment=groups,
            weights=merge,
        )

    @property
    def kept(self) -> int:
        """Number of outputs of each item, M."""
        return self.positions.shape[1]

    @property
    def gathers(self) -> bool:
        """Whether every output is the source token at its position, untouched."""
        return self.weights is None and self.synthetic is None

    @property
    def source_count(self) -> int:
        """Number of source tokens of each item, N."""
        return self.assignment.shape[1]

    @property
    def ratio(self) -> float:
        """Realised share of the tokens, M / N."""
        return self.kept / self.source_count if self.source_count else 1.0

    def apply(self, tensor: Tensor) -> Tensor:
        """Reduce any per-token tensor the same way as the features.

        Args:
            tensor: ``(B, N, ...)``; floating point tensors are merged, others gathered at the
                kept positions.

        Returns:
            ``(B, M, ...)``.

        Raises:
            ReductionError: if the tensor does not hold one entry for each source token.
        """
        if tensor.shape[:2] != self.assignment.shape:
            raise ReductionError(
                f"apply: a per-token tensor begins with {tuple(self.assignment.shape)}, got "
                f"{tuple(tensor.shape)}."
            )
        if self.weights is None or not tensor.is_floating_point():
            return gather_tokens(tensor, self.positions)
        return merge_tokens(tensor, self.weights, self.kept)

    def on(self, features: Tensor) -> Reduction:
        """The same reduction of other features of the same tokens.

        Args:
            features: ``(B, N, D)``, on any device.
        """
        device = features.device
        moved = replace(
            self,
            positions=self.positions.to(device),
            assignment=self.assignment.to(device),
            weights=self.weights and MergeWeights(*(part.to(device) for part in self.weights)),
        )
        return replace(moved, features=moved.apply(features))

    def group_sizes(self, sizes: Tensor | None = None) -> Tensor:
        """``(B, M)`` float32: how many source tokens each output stands for.

        Args:
            sizes: ``(B, N)`` sizes of the source tokens themselves; ones if omitted.
        """
        if sizes is None:
            sizes = self.features.new_ones(self.assignment.shape, dtype=torch.float32)
        # Dropped tokens are sent to a spare last column.
        flowed = sizes.new_zeros((sizes.shape[0], self.kept + 1), dtype=torch.float32)
        sent = self.assignment.masked_fill(self.assignment < 0, self.kept)
        return flowed.scatter_add(1, sent, sizes.float())[:, : self.kept]

    def tokens(self, source: VisualTokens) -> list[VisualTokens]:
        """The outputs as tokens for a further reducer, one batch of one for each item.

        Items are returned apart because reduced items no longer share a layout.

        Args:
            source: the tokens that were reduced.
        """
        sizes = self.group_sizes(source.sizes)
        vocabulary = _per_token_signals(source)
        signals = {
            name: self.apply(signal) if name in vocabulary else signal
            for name, signal in source.signals.items()
        }
        return [
            VisualTokens(
                self.features[b : b + 1],
                source.layout.select(self.positions[b]),
                sizes=sizes[b : b + 1],
                signals={name: signal[b : b + 1] for name, signal in signals.items()},
            )
            for b in range(self.positions.shape[0])
        ]

    def then(self, other: Reduction) -> Reduction:
        """This reduction followed by one of its outputs.

        Args:
            other: a reduction whose source tokens are this one's outputs.

        Raises:
            ReductionError: if the two do not fit together.
        """
        if other.assignment.shape != self.positions.shape:
            raise ReductionError(
                f"then: the second reduction was made of {tuple(other.assignment.shape)} tokens, "
                f"this one gives {tuple(self.positions.shape)}."
            )
        # Dropped tokens are looked up in a spare last column.
        onward = torch.nn.functional.pad(other.assignment, (0, 1), value=DROPPED)
        moved = onward.gather(1, self.assignment.masked_fill(self.assignment < 0, self.kept))
        weights = None
        if self.weights is not None or other.weights is not None:
            weights = compose(
                other.weights if other.weights is not None else other._selection(),
                self.weights if self.weights is not None else self._selection(),
                self.kept,
            )
        synthetic = other.synthetic
        if self.synthetic is not None:
            carried = self.synthetic.gather(1, other.positions)
            synthetic = carried if synthetic is None else carried | synthetic
        scores = self.scores
        if other.scores is not None:
            asked = torch.full_like(self.assignment, torch.nan, dtype=other.scores.dtype)
            scores = asked.scatter(1, self.positions, other.scores)
        return Reduction(
            features=other.features,
            positions=self.positions.gather(1, other.positions),
            assignment=moved,
            weights=weights,
            synthetic=synthetic,
            reason=self.reason and other.reason,
            scores=scores,
        )

    def _selection(self) -> MergeWeights:
        """The gather at the kept positions, as edges."""
        output = torch.arange(self.kept, device=self.positions.device).expand_as(self.positions)
        return MergeWeights(output, self.positions, torch.ones_like(output, dtype=torch.float32))

    def __repr__(self) -> str:
        kind = "pruned" if self.weights is None else "merged"
        why = f", reason={self.reason!r}" if self.reason else ""
        batch = self.positions.shape[0]
        return f"Reduction(batch={batch}, {self.source_count} -> {self.kept} tokens, {kind}{why})"

    def item(self, index: int) -> Reduction:
        """One item of the batch, as a batch of one."""
        one = slice(index, index + 1)
        return replace(
            self,
            features=self.features[one],
            positions=self.positions[one],
            assignment=self.assignment[one],
            weights=None if self.weights is None else MergeWeights(*(w[one] for w in self.weights)),
            synthetic=None if self.synthetic is None else self.synthetic[one],
            scores=None if self.scores is None else self.scores[one],
        )

    def check(self, tokens: VisualTokens, *, strategy: str) -> None:
        """Verify the shape of the contract; values are the conformance kit's business.

        Raises:
            ReductionError: naming the strategy and what is wrong.
        """
        b, n, d = tokens.values.shape
        if self.features.shape[-1] == tokens.features.shape[2]:
            # Wrappers put outputs together of what was compared.
            d = self.features.shape[-1]
        m = self.positions.shape[-1]
        for name, tensor, shape in (
            ("features", self.features, (b, m, d)),
            ("positions", self.positions, (b, m)),
            ("assignment", self.assignment, (b, n)),
        ):
            if tuple(tensor.shape) != shape:
                raise ReductionError(
                    f"strategy {strategy!r} returned {name} of shape {tuple(tensor.shape)}, "
                    f"expected {shape} for {b} items of {n} tokens."
                )
        in_order = self.verified is self.positions or (
            not self.positions.is_floating_point() and _ascending(self.positions, n)
        )
        if not in_order:
            raise PositionsError(
                f"strategy {strategy!r} returned positions that are not distinct, ascending "
                f"indices of its {n} tokens: a token was kept twice, a group is empty, or an index "
                "is out of range."
            )
        if self.features.dtype != tokens.features.dtype:
            raise ReductionError(
                f"strategy {strategy!r} returned features of type {self.features.dtype}, "
                f"was given {tokens.features.dtype}. Accumulate in float32, then cast back."
            )


def _ascending(positions: Tensor, n: int) -> bool:
    """Whether each row holds distinct indices of [0, n), ascending."""
    padded = torch.nn.functional.pad(positions, (1, 0), value=-1)
    padded = torch.nn.functional.pad(padded, (0, 1), value=n)
    return bool((padded.diff(dim=1) > 0).all())


def _per_token_signals(tokens: VisualTokens) -> set[str]:
    vocabulary = installed().signals
    return {name for name in tokens.signals if vocabulary[name].per_token}
