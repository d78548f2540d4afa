"""One encoding by an encoder whose blocks see all items end to end, ``(S, D)`` (Qwen-VL).

The encoder packs several patches into one token of the LLM, so it is these units that merge or go:
slot by slot, compared by the mean of their keys. Rotary embeddings and the bounds of attention
segments (frames, windows) follow the units that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce.errors import StageNotEngaged, UnsupportedModel
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.receipt import Stopwatch
from tokenreduce.reduction import DROPPED
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.encoders.dense import Trail
from tokenreduce_integrations.encoders.kinds import BlockCall, packed_keys, takes_bias
from tokenreduce_integrations.encoders.plan import Cut, plan_cuts

#: The argument by which blocks hand the sizes of merged tokens to the attention kernel.
BIAS = "tokenreduce_bias"


class SegmentBias:
    """Log sizes of the tokens, for attention that is computed segment by segment.

    It begins anew after the last segment, since checkpointing runs a block twice.
    """

    def __init__(self, log_sizes: Tensor) -> None:
        self._log_sizes = log_sizes
        self._begin = 0

    def next(self, length: int) -> Tensor:
        """``(1, 1, 1, length)`` of the next segment."""
        end = self._begin + length
        segment = self._log_sizes[self._begin : end]
        self._begin = end % self._log_sizes.shape[0]
        return segment[None, None, None]


class PackedWalk:
    """The state of one encoding.

    Args:
        stages: those at the vision site that act now.
        exposed: indices of the blocks whose outputs something outside the encoder reads.
        layouts: where the units of each item lie.
        unit: patches of a unit.
        order: ``(U,)`` the unit, in the order of the LLM, at each place of the encoder's sequence;
            None where the two orders are one.
        depth: number of blocks.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        exposed: Collection[int],
        layouts: Sequence[Layout],
        unit: int,
        order: Tensor | None,
        depth: int,
    ) -> None:
        self.stages = stages
        self.layouts = tuple(layouts)
        self.stopwatch = Stopwatch()
        self.trails: dict[int, Trail] = {}
        self.engaged = False
        self._counts = [len(layout) for layout in layouts]
        items = range(len(layouts))
        self._plan: dict[int, list[Cut]] = plan_cuts(stages, depth, self._counts, items)
        self._exposed = exposed
        self._unit = unit
        self._order = order
        self._trail: Trail | None = None
        self._places: Tensor | None = None
        self._sizes: Tensor | None = None
        self._keys: Tensor | None = None
        self._shorter: Tensor | None = None
        self._shown: Tensor | None = None
        self._bounds: dict[int, tuple[Tensor, Tensor]] = {}
        self._rotary: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}

    def run(self, block: BlockCall, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Run a block on the units that are left; see :meth:`DenseWalk.run`."""
        self.engaged = True
        cuts = self._plan.get(block.index + 1, [])
        if self._trail is None and not cuts:
            return block.forward(hidden, **arguments)
        if self._trail is not None:
            hidden = self._enter(hidden)
            arguments = self._follow(arguments, hidden, block.attention)
        output: Tensor = block.forward(hidden, **arguments)
        for cut in cuts:
            with self.stopwatch.running(output.device):
                output = self._cut(output, cut, block.attention)
        self._keys = None
        if self._trail is None or block.index not in self._exposed:
            return output
        self._shorter, self._shown = output, self._restore(output, self._unit)
        return self._shown

    def catch(self, name: str, output: Tensor) -> None:
        """Keep the fused projection of the block under way."""
        self._keys = output

    def release(self) -> None:
        """Let go of features when the encoding is over."""
        self._keys = self._shorter = self._shown = self._sizes = None
        self._bounds, self._rotary = {}, {}

    def merge(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what packs units for the LLM on those that are left, and fill up its output."""
        hidden = args[0] if args else None
        if self._trail is None or hidden is None or hidden is not self._shown:
            return call(*args, **kwargs)
        return self._restore(call(self._shorter, *args[1:], **kwargs), 1)

    # -- the shorter sequence ------------------------------------------------------------------

    def _enter(self, hidden: Tensor) -> Tensor:
        shorter, shown, self._shorter, self._shown = self._shorter, self._shown, None, None
        if shorter is not None and hidden is shown:
            return shorter
        places = self._left
        if hidden.shape[0] == places.shape[0] * self._unit:
            return hidden
        # A copy of the full sequence: accelerate moved it to the device of this block.
        units: Tensor = hidden.unflatten(0, (-1, self._unit))[places]
        return units.flatten(0, 1)

    @property
    def _left(self) -> Tensor:
        """``(u,)`` ascending places in the encoder's full sequence of the units that are left."""
        if self._places is None:
            raise StageNotEngaged("nothing was cut yet.")
        return self._places

    def _cut(self, hidden: Tensor, cut: Cut, attention: Any) -> Tensor:
        units = hidden.reshape(-1, self._unit * hidden.shape[1])
        first = self._places is None
        total = sum(len(layout) for layout in self.layouts)
        places = torch.arange(total, device=hidden.device) if first else self._left
        order = places if self._order is None else self._order.to(hidden.device)[places]
        # Items are consecutive in both orders, so one sort puts each item's units in reading order.
        reading = order.argsort()
        layouts = self.layouts if first else tuple(Layout.line(n) for n in self._counts)
        signals = {}
        if self._keys is not None:
            keys = packed_keys(self._keys, attention).detach().mean(1)
            signals["keys"] = keys.unflatten(0, (-1, self._unit)).mean(1)[reading]
        packed = PackedTokens(
            features=units[reading],
            layouts=layouts,
            sizes=None if self._sizes is None else self._sizes[reading],
            signals=signals,
        )
        reductions = reduce_packed(packed, cut.reducers)
        before, after = packed.offsets, [0]
        for reduction in reductions:
            after.append(after[-1] + reduction.kept)
        kept = torch.cat(
            [r.positions[0] + start for r, start in zip(reductions, before, strict=False)]
        )
        flowed = torch.cat(
            [
                torch.where(r.assignment[0] < 0, DROPPED, r.assignment[0] + start)
                for r, start in zip(reductions, after, strict=False)
            ]
        )
        units = torch.cat([r.features[0] for r in reductions])
        if self._sizes is not None or any(not r.gathers for r in reductions):
            sizes = torch.zeros(kept.shape[0], device=hidden.device)
            stays = flowed >= 0
            old = units.new_ones(flowed.shape, dtype=torch.float32)
            old = old if packed.sizes is None else packed.sizes
            self._sizes = sizes.scatter_add(0, flowed[stays], old[stays])
        places = places[reading][kept]
        back = places.argsort()
        self._places, self._counts = places[back], [r.kept for r in reductions]
        if self._sizes is not None:
            self._sizes = self._sizes[back]
        self._bounds, self._rotary = {}, {}
        self._record(cut, flowed, order[reading][kept], tuple(r.reason for r in reductions))
        return units[back].reshape(-1, hidden.shape[1])

    def _record(
        self, cut: Cut, flowed: Tensor, positions: Tensor, reasons: tuple[str, ...]
    ) -> None:
        """Compose what became of the units, in the order of the LLM."""
        assignment = flowed
        if self._trail is not None:
            old = self._trail.assignment
            assignment = torch.where(old < 0, DROPPED, flowed[old.clamp(min=0)])
        self._trail = self.trails[cut.stage] = Trail(assignment, positions, reasons)

    def _restore(self, shorter: Tensor, unit: int) -> Tensor:
        """The full sequence ``(U unit, D)`` of a shorter one: units show what they flowed into."""
        if self._trail is None:
            return shorter
        # The trail counts outputs in reading order, the sequence those at ascending places.
        reading = self._trail.positions
        place_of = reading
        if self._order is not None:
            place_of = self._order.to(reading.device).argsort()[reading]
        rank = place_of.argsort().argsort()
        assignment = self._trail.assignment
        if self._order is not None:
            assignment = assignment[self._order.to(assignment.device)]
        full: Tensor = shorter.unflatten(0, (-1, unit))[rank[assignment.clamp(min=0)]]
        full = full.masked_fill((assignment < 0)[:, None, None], 0)
        return full.flatten(0, 1)

    # -- what blocks are given beside the hidden states ------------------------------------------

    def _follow(self, arguments: dict[str, Any], hidden: Tensor, attention: Any) -> dict[str, Any]:
        arguments = dict(arguments)
        bounds = arguments["cu_seqlens"]
        arguments["cu_seqlens"] = self._shorter_bounds(bounds)
        if arguments.get("max_seqlen") is not None:
            lengths = arguments["cu_seqlens"].diff()
            longest = arguments["max_seqlen"]
            arguments["max_seqlen"] = (
                lengths.max() if isinstance(longest, Tensor) else int(lengths.max())
            )
        arguments["position_embeddings"] = self._shorter_rotary(arguments["position_embeddings"])
        if self._sizes is not None:
            if not takes_bias(attention):
                raise UnsupportedModel(
                    f"the attention kernel of {type(attention).__name__} takes no additive mask, "
                    "which merged tokens need (attention is proportional to how many patches they "
                    "stand for). Load the model with attn_implementation='sdpa'."
                )
            log_sizes = self._sizes.log().repeat_interleave(self._unit).to(hidden.dtype)
            arguments[BIAS] = SegmentBias(log_sizes)
        return arguments

    def _shorter_bounds(self, bounds: Tensor) -> Tensor:
        """Bounds of the attention segments; those without a unit left vanish."""
        known = self._bounds.get(id(bounds))
        if known is not None:
            return known[1]
        ends = bounds[1:].to(torch.long)
        segment = torch.searchsorted(ends, self._left.to(ends.device) * self._unit, right=True)
        lengths = torch.bincount(segment, minlength=ends.shape[0]) * self._unit
        ends = lengths[lengths > 0].cumsum(0)
        shorter = torch.nn.functional.pad(ends, (1, 0)).to(bounds.dtype)
        self._bounds[id(bounds)] = (bounds, shorter)
        return shorter

    def _shorter_rotary(self, embeddings: Any) -> tuple[Tensor, ...]:
        known = self._rotary.get(id(embeddings))
        if known is not None:
            return known[1]
        places = self._left
        shorter = tuple(
            e.unflatten(0, (-1, self._unit))[places.to(e.device)].flatten(0, 1) for e in embeddings
        )
        self._rotary[id(embeddings)] = (embeddings, shorter)
        return shorter
