"""Reducing a clip of any length while it arrives, in memory for the budget and one window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, MissingSignal, TokensError
from tokenreduce.ops.merging import MergeWeights, merge_tokens
from tokenreduce.ops.tracks import mean_direction
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import Layout, VisualTokens

if TYPE_CHECKING:
    from tokenreduce.reducer import Reducer

#: The least tokens that arrive before the stream is reduced again, unless a user says otherwise.
WINDOW = 16384

#: Most channels, and the least part of all channels, that are merged at once.
CHANNELS, PARTS = 32, 32

#: A last frame is held that is at most one part in so many of what a window has room for.
PART = 8


class TokenStream:
    """Holds at most ``budget`` tokens of the frames fed so far, and a window of new ones.

    Frames are gathered until the window is full; then what is held and what is new are reduced
    together to the budget, by the strategy itself, with sizes that say what each token stands for
    and with the scores that it gave to what is held. Up to ``budget`` tokens and three quarters of
    the window the result is that of the whole clip at once; beyond, the strategy sees earlier
    frames through the tokens that it kept of them, as they arrived, and is told the mean direction
    of all that was fed. What merges into those is carried beside them, weighted as the strategy
    says. The last frame of a window, unless it is large, is held whole until the next is reduced,
    since what it shows goes on there; the strategy is told what each of its tokens belongs to. How
    frames are cut into calls of :meth:`feed` does not matter.

    Memory: never more than two budgets and the window, if that is at least three budgets, for what
    is held, what merged into it, what is new, the result of :meth:`tokens`, and a quarter of the
    window for the strategy's own work. A smaller window serves too: that result then comes on top.
    What a large window leaves is shared by new tokens and by more tokens held than the budget.

    Args:
        reducer: the strategy; a budget of its own is replaced.
        budget: most tokens to hold.
        window: tokens of memory for what is new. If omitted, 16,384, or three budgets if that
            is more, so that time stays in proportion to the tokens.
        channels: how many of the features' first channels the strategy sees; all if omitted. The
            others only go along, and merge alike: what else belongs to a token.

    Attributes:
        seen: tokens fed so far.
        frames: frames fed so far.

    Raises:
        BudgetError: if ``budget`` is no positive number of tokens.
        MissingSignal: if the strategy reads more than features.
        TokensError: if ``window`` is not positive, or the strategy needs a full grid.
    """

    def __init__(
        self,
        reducer: Reducer,
        *,
        budget: int,
        window: int | None = None,
        channels: int | None = None,
    ) -> None:
        if not Budget(keep=budget).keep:
            raise BudgetError(f"{reducer.name}: a stream holds at least one token.")
        window = max(WINDOW, 3 * budget) if window is None else window
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise TokensError(f"window={window!r}: a window holds at least one token.")
        if reducer.needs:
            raise MissingSignal(
                f"{reducer.name} reads {', '.join(reducer.needs)}: signals are not carried by a "
                "stream. Use a strategy that reads features only, such as lftr."
            )
        records = (reducer.record, *(inner.record for inner in reducer.inner_reducers()))
        if any(record.needs_grid for record in records):
            raise TokensError(
                f"{reducer.name} needs a full grid of tokens, which a stream that was reduced "
                "before no longer is. Use a strategy that does not, such as lftr."
            )
        self.reducer = reducer.with_budget(keep=budget)
        self.budget, self.window, self._channels = budget, window, channels
        self.seen = self.frames = 0
        spare = window - window // 4
        # What a large window has room for is held beyond the budget: what begins as a window ends
        # shows its extent only in the next.
        self._most = budget + max(0, spare - 2 * budget) // 4
        # Rows in use: while nothing merged, and since.
        self._rows = budget + spare, max(budget + spare, 2 * self._most + max(1, spare // 2))
        # What is held and new begins at row 0, or behind what merged. The first `_known` of it went
        # through the strategy before.
        self._held = self._merged = self._known = 0
        self._direction: Tensor | None = None
        self._features: Tensor | None = None
        self._coords = torch.zeros(self._rows[1], 4, dtype=torch.long)
        self._positions = torch.zeros(self._rows[1], dtype=torch.long)
        self._groups = torch.zeros(self._rows[1], dtype=torch.long)
        self._sizes = torch.ones(self._rows[1])
        self._scores = torch.full(self._rows[1:], torch.nan)

    def feed(self, features: Tensor, grid: Sequence[int]) -> None:
        """Add the next frames.

        Args:
            features: ``(N, D)`` their tokens in raster order.
            grid: (T, H, W) or, for one frame, (H, W); its product is N.

        Raises:
            TokensError: if the grid does not hold the tokens, or width, type or device differ
                from those of the frames before, or the features hold NaN or infinity.
        """
        layout = Layout.from_grid(grid)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(layout):
            raise TokensError(f"a stream is fed features (N, D) and their grid, got {grid!r}.")
        space = self._space(features)
        coords = layout.coords + torch.tensor([0, self.frames, 0, 0])
        frame = len(layout) // (int(layout.coords[-1, 1]) + 1)
        done = 0
        while done < len(features):
            begin, end, columns = self._merged, self._rows[self._merged > 0], 1 + bool(self._merged)
            room = end - begin - self._held
            # A window ends with a frame, unless a frame is larger than a window.
            fits = room if frame > end - columns * self._most else room // frame * frame
            count = min(fits, len(features) - done)
            if count == 0:
                self._reduce()
                continue
            new, given = slice(self._held, self._held + count), slice(done, done + count)
            space[begin:][new] = features[given].detach()
            self._coords[new], self._sizes[new] = coords[given], 1
            self._positions[new] = torch.arange(self.seen, self.seen + count)
            self._groups[new] = self._positions[new]
            self._scores[new] = torch.nan
            self._held, done, self.seen = self._held + count, done + count, self.seen + count
        self.frames += int(layout.coords[-1, 1]) + 1

    def tokens(self) -> VisualTokens:
        """The tokens so far, at most ``budget``, with coordinates and sizes; a batch of one.

        Asking changes nothing: further frames may be fed.

        Raises:
            TokensError: if nothing was fed yet.
        """
        held = self._gathered()
        reduction = self._choose(held, self.budget)
        count = self._held if reduction is None else reduction.kept
        space = self._room()
        features = space.new_empty(count, space.shape[1])
        for channels in self._blocks():
            features[:, channels] = self._outputs(channels, reduction)
        sizes, rows = held.sizes.clone(), torch.arange(self._held)
        if reduction is not None:
            sizes, rows = reduction.group_sizes(held.sizes), reduction.positions[0]
        return VisualTokens(features[None], held.layout.select(rows), sizes=sizes)

    def positions(self) -> Tensor:
        """``(M,)`` which of the tokens fed so far those of :meth:`tokens` stand at, ascending."""
        reduction = self._choose(self._gathered(), self.budget)
        positions = self._positions[: self._held]
        return positions.clone() if reduction is None else positions[reduction.positions[0].cpu()]

    def _choose(self, held: VisualTokens, most: int) -> Reduction | None:
        """What the strategy makes of the tokens held; None if they are no more than ``most``."""
        if self._held <= most:
            return None
        reduction = self.reducer.with_budget(keep=most)(held)
        if reduction.kept > most:
            raise BudgetError(
                f"{self.reducer.name} kept {reduction.kept} tokens, the stream asked for {most}:"
                " it does not meet a budget exactly. Use a strategy that does, such as lftr."
            )
        return reduction

    def _reduce(self) -> None:
        """Make room for a window."""
        held = self._gathered()
        reduction = self._choose(held, self._most)
        if reduction is None:
            return
        numbers = self._groups[: self._held]
        joined, at = (rows[0].cpu() for rows in (reduction.assignment, reduction.positions))
        self._groups[: self._held] = torch.where(
            joined < 0, self._positions[: self._held], numbers[at][joined]
        )
        t = self._coords[: self._held, 1]
        last = t == t[-1]
        if PART * int(last.sum()) <= self._rows[1] - 2 * self._most:
            reduction = _apart(reduction, last)
        kept, count = reduction.positions[0], reduction.kept
        merged = count if self._merged or not reduction.gathers else 0
        left, rows = slice(count), kept.cpu()
        self._sizes[left] = reduction.group_sizes(held.sizes)[0].cpu()
        if reduction.scores is not None:
            # Before features move: scores may be a view of them.
            self._scores[: self._held] = reduction.scores[0].float().cpu()
        for column in (self._coords, self._positions, self._groups, self._scores):
            column[left] = column[rows]
        seen = held.signals.get("seen_direction")
        self._direction = self._mean_direction() if seen is None else seen
        features, begin = self._room(), merged
        for channels in self._blocks():
            own = self._arrived(channels)[kept]
            if merged:
                features[:merged, channels] = self._outputs(channels, reduction)
            features[begin : begin + count, channels] = own
        self._held, self._merged, self._known = count, merged, count

    def _outputs(self, channels: slice, reduction: Reduction | None) -> Tensor:
        """Some channels of what a reduction leaves, with all that merged into it."""
        values = self._arrived(channels)
        if self._merged:
            values = torch.cat([self._room()[: self._merged, channels], values[self._merged :]])
        if reduction is None:
            return values
        if reduction.weights is None:
            return values[reduction.positions[0]]
        return merge_tokens(values[None], reduction.weights, reduction.kept)[0]

    def _arrived(self, channels: slice) -> Tensor:
        """Some channels of what is held and what is new, as it arrived."""
        return self._room()[self._merged : self._merged + self._held, channels]

    def _blocks(self) -> Iterator[slice]:
        """The channels, a few at a time."""
        count = self._room().shape[1]
        width = min(CHANNELS, max(1, count // PARTS))
        return (slice(start, start + width) for start in range(0, count, width))

    def _gathered(self) -> VisualTokens:
        features = self._arrived(slice(self._channels))[None]
        signals = {}
        if self._known:
            signals["seen_direction"] = self._mean_direction()
            signals["former_groups"] = self._groups[None, : self._held].to(features.device)
        if not bool(self._scores[: self._held].isnan().all()):
            signals["former_scores"] = self._scores[None, : self._held].to(features.device)
        return VisualTokens(
            features,
            self._coords[: self._held],
            sizes=self._sizes[None, : self._held].to(features.device),
            signals=signals,
            # What the strategy would make of tokens as they arrived is of no use: see `_outputs`.
            values=features[..., :1],
        )

    def _mean_direction(self) -> Tensor:
        """``(1, D)`` mean direction of all tokens fed so far."""
        new = self._arrived(slice(self._channels))[self._known :]
        mean = mean_direction(new, torch.ones(1, len(new), device=new.device))
        if self._direction is None:
            return mean
        return self._direction.lerp(mean, len(new) / self.seen)

    def _room(self) -> Tensor:
        if self._features is None:
            raise TokensError("nothing was fed to this stream yet: feed(features, grid) first.")
        return self._features

    def _space(self, features: Tensor) -> Tensor:
        """Room for the budget and a window."""
        if self._features is None:
            self._features = features.new_empty(self._rows[1], features.shape[1])
        expected, given = (
            f"{t.shape[1]} channels of {t.dtype} on {t.device}" for t in (self._features, features)
        )
        if given != expected:
            raise TokensError(f"the stream holds features of {expected}, and is fed {given}.")
        return self._features


def _apart(reduction: Reduction, rows: Tensor) -> Reduction:
    """The same reduction, but for the sources at ``rows`` ``(N,)``: each is an output of its own.

    What is left of a group weighs as much as the whole did.
    """
    before = reduction.positions[0]
    alone = rows.to(before.device).index_fill(0, before, False)
    rank = alone.index_fill(0, before, True).cumsum(0) - 1
    assignment = torch.where(reduction.assignment < 0, DROPPED, rank[before][reduction.assignment])
    own = alone.nonzero()[:, 0]
    assignment[0, own] = rank[own]
    weights = reduction.weights
    if weights is not None:
        output, source, value = (column[0] for column in weights)
        left = value.masked_fill(alone[source], 0)
        whole, rest = (
            value.new_zeros(reduction.kept).index_add(0, output, part) for part in (value, left)
        )
        weights = MergeWeights(
            torch.cat([rank[before][output], rank[own]])[None],
            torch.cat([source, own])[None],
            torch.cat([left * (whole / rest)[output], left.new_ones(len(own))])[None],
        )
    positions = torch.cat([before, own]).sort().values[None]
    return replace(reduction, positions=positions, assignment=assignment, weights=weights)
