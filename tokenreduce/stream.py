"""Reducing a clip of any length while it arrives, in memory for the budget and one window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, MissingSignal, TokensError
from tokenreduce.ops.merging import merge_tokens
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens

if TYPE_CHECKING:
    from tokenreduce.reducer import Reducer

#: The least tokens that arrive before the stream is reduced again, unless a user says otherwise.
WINDOW = 8192

#: Tokens that move at once, and channels that merge at once.
TOKENS, CHANNELS = 128, 32


class TokenStream:
    """Holds at most ``budget`` tokens of the frames fed so far, and a window of new ones.

    Frames are gathered until the window is full; then what is held and what is new are reduced
    together to the budget, by the strategy itself, with sizes that say what each token stands for.
    Up to ``budget + window`` tokens the result is that of the whole clip at once; beyond, the
    strategy sees earlier frames through the tokens that it kept of them, as they arrived. What
    merges into those is carried beside them, weighted as the strategy says. How frames are cut
    into calls of :meth:`feed` does not matter.

    Memory: the budget and a window; and where the strategy merges, the budget again for what
    merged.

    Args:
        reducer: the strategy; a budget of its own is replaced.
        budget: most tokens to hold.
        window: tokens that arrive before they are reduced. If omitted, 8192, or the budget if that
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
        window = max(WINDOW, budget) if window is None else window
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
        self._held = 0
        self._features: Tensor | None = None
        self._merged: Tensor | None = None
        self._coords = torch.zeros(budget + window, 4, dtype=torch.long)
        self._positions = torch.zeros(budget + window, dtype=torch.long)
        self._sizes = torch.ones(budget + window)

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
            room = len(space) - self._held
            # A window ends with a frame, unless a frame is larger than a window.
            fits = room if frame > self.window else room // frame * frame
            count = min(fits, len(features) - done)
            if count == 0:
                self._reduce()
                continue
            new, given = slice(self._held, self._held + count), slice(done, done + count)
            space[new] = features[given].detach()
            self._coords[new], self._sizes[new] = coords[given], 1
            self._positions[new] = torch.arange(self.seen, self.seen + count)
            self._held, done, self.seen = self._held + count, done + count, self.seen + count
        self.frames += int(layout.coords[-1, 1]) + 1

    def tokens(self) -> VisualTokens:
        """The tokens so far, at most ``budget``, with coordinates and sizes; a batch of one.

        Asking changes nothing: further frames may be fed.

        Raises:
            TokensError: if nothing was fed yet.
        """
        held = self._gathered()
        reduction = self._choose(held)
        if reduction is None:
            features, sizes, layout = self._values(slice(None)).clone(), held.sizes, held.layout
        else:
            sizes, layout = (
                reduction.group_sizes(held.sizes),
                held.layout.select(reduction.positions[0]),
            )
            features = self._merge(reduction)
        return VisualTokens(features[None], layout, sizes=sizes)

    def positions(self) -> Tensor:
        """``(M,)`` which of the tokens fed so far those of :meth:`tokens` stand at, ascending."""
        reduction = self._choose(self._gathered())
        positions = self._positions[: self._held]
        return positions.clone() if reduction is None else positions[reduction.positions[0].cpu()]

    def _choose(self, held: VisualTokens) -> Reduction | None:
        """What the strategy makes of the tokens held; None while they are within the budget."""
        if self._held <= self.budget:
            return None
        reduction = self.reducer(held)
        if reduction.kept > self.budget:
            raise BudgetError(
                f"{self.reducer.name} kept {reduction.kept} tokens, the stream holds {self.budget}:"
                " it does not meet a budget exactly. Use a strategy that does, such as lftr."
            )
        return reduction

    def _reduce(self) -> None:
        """Make room for a window."""
        held = self._gathered()
        reduction = self._choose(held)
        if reduction is None:
            return
        kept, count = reduction.positions[0], reduction.kept
        if self._merged is not None or not reduction.gathers:
            self._merged = self._merge(reduction, into=self._merged)
        sizes, left = reduction.group_sizes(held.sizes)[0], slice(count)
        features = self._room()
        for block in torch.arange(count).split(TOKENS):
            # Tokens move towards the front, so none is overwritten before it moves.
            features[block] = features[kept[block]]
        self._coords[left] = self._coords[kept.cpu()]
        self._positions[left] = self._positions[kept.cpu()]
        self._sizes[left] = sizes.cpu()
        self._held = count

    def _merge(self, reduction: Reduction, into: Tensor | None = None) -> Tensor:
        """``(M, D)`` what is left, with all that merged into it, a few channels at a time."""
        kept, space = reduction.positions[0], self._room()
        channels = space.shape[1]
        merged = into
        if merged is None or len(merged) != len(kept):
            merged = space.new_empty(len(kept), channels)
        for start in range(0, channels, CHANNELS):
            block = slice(start, start + CHANNELS)
            values = self._values(block)
            if reduction.weights is None:
                merged[:, block] = values[kept]
            else:
                merged[:, block] = merge_tokens(values[None], reduction.weights, len(kept))[0]
        return merged

    def _values(self, channels: slice) -> Tensor:
        """Some channels of what is held, with all that merged into it."""
        own = self._room()[: self._held, channels]
        if self._merged is None:
            return own
        return torch.cat([self._merged[:, channels], own[len(self._merged) :]])

    def _gathered(self) -> VisualTokens:
        features = self._room()[None, : self._held, : self._channels]
        return VisualTokens(
            features,
            self._coords[: self._held],
            sizes=self._sizes[None, : self._held].to(features.device),
            # What the strategy would make of tokens as they arrived is of no use: see `_merge`.
            values=features[..., :1],
        )

    def _room(self) -> Tensor:
        if self._features is None:
            raise TokensError("nothing was fed to this stream yet: feed(features, grid) first.")
        return self._features

    def _space(self, features: Tensor) -> Tensor:
        """Room for the budget and a window."""
        if self._features is None:
            self._features = features.new_empty(len(self._positions), features.shape[1])
        expected, given = (
            f"{t.shape[1]} channels of {t.dtype} on {t.device}" for t in (self._features, features)
        )
        if given != expected:
            raise TokensError(f"the stream holds features of {expected}, and is fed {given}.")
        return self._features
