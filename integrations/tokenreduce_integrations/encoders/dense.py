"""One encoding by an encoder whose blocks see batches of sequences, ``(B, S, D)``.

Between blocks the shorter sequence travels on; a block whose output something outside the encoder
reads hands on the full one, in which each source token shows what it flowed into (zeros, if it was
dropped). Norms, pooling and reshaping after the encoder thus see their usual shapes, and a mean
over the full sequence is the size-weighted mean over the shorter one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenreduce.errors import StageNotEngaged, UnsupportedModel
from tokenreduce.ops import gather_tokens
from tokenreduce.receipt import Stopwatch
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_integrations.encoders.kinds import BlockCall, per_head, takes_bias
from tokenreduce_integrations.encoders.plan import Cut, plan_cuts


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What an encoder's sequences are made of.

    A unit is what becomes one token of the LLM: a patch, or several that the model packs.

    Attributes:
        layouts: where the units of each sequence lie.
        owners: the item (an image with its tiles) that each sequence belongs to.
        prefix: class and register tokens at the beginning, which no stage touches.
        unit: patches of a unit.
        order: ``(N,)`` the patch in each slot of each unit; None where units are consecutive.
        valid: ``(B, N)`` False where a batch of unequal sequences is padded; None without padding.
    """

    layouts: tuple[Layout, ...]
    owners: tuple[int, ...]
    prefix: int = 0
    unit: int = 1
    order: Tensor | None = None
    valid: Tensor | None = None


class Trail(NamedTuple):
    """What became of the units of a batch.

    Attributes:
        assignment: ``(B, N)`` the output that each unit flowed into, -1 dropped.
        positions: ``(B, M)`` the unit that each output stands at.
        reasons: for each sequence, why a stage left it as it was, or an empty string.
    """

    assignment: Tensor
    positions: Tensor
    reasons: tuple[str, ...]


class DenseWalk:
    """The state of one encoding.

    Args:
        stages: those at the vision site that act now.
        depth: blocks that the features for the LLM depend on.
        exposed: indices of the blocks whose outputs something outside the encoder reads.
        describe: what the sequences are made of, given their number and length.
        signals: names of the signals to read in the blocks.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        depth: int,
        exposed: Collection[int],
        describe: Callable[[int, int], Sequences],
        signals: Collection[str],
    ) -> None:
        self.stages = stages
        self.stopwatch = Stopwatch()
        self.trails: dict[int, Trail] = {}
        self._plan: dict[int, list[Cut]] = {}
        self._blocks_seen = 0
        self._depth = depth
        self._exposed = exposed
        self._describe = describe
        self._signals = signals
        self._caught: dict[str, Tensor] = {}
        self._sequences: Sequences | None = None
        self._trail: Trail | None = None
        self._counts: list[int] = []
        self._sizes: Tensor | None = None
        self._bias: Tensor | None = None
        self._patches: Tensor | None = None
        self._shorter: Tensor | None = None
        self._shown: Tensor | None = None

    @property
    def sequences(self) -> Sequences:
        """What the sequences are made of.

        Raises:
            StageNotEngaged: if the blocks have not run.
        """
        if self._sequences is None:
            raise StageNotEngaged(
                "the encoder ran, but its blocks were never seen: it ran compiled before (attach "
                "first, or call torch.compiler.reset()), or something replaced their forward."
            )
        return self._sequences

    def run(self, block: BlockCall, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Run a block on the shorter sequence.

        Args:
            block: the block.
            hidden: ``(B, S, D)`` hidden states that it was given.
            arguments: its further arguments, by name.
        """
        if block.index == 0:
            self._begin(hidden)
        elif block.index != self._blocks_seen:
            raise UnsupportedModel(
                f"block {block.index} of class {type(block.block).__name__} ran after "
                f"{self._blocks_seen} blocks: the encoder skips or repeats blocks, and stages "
                "inside it cannot follow."
            )
        self._blocks_seen = block.index + 1
        cuts = self._plan.get(block.index + 1, [])
        if self._trail is None and not cuts:
            return block.forward(hidden, **arguments)
        if self._trail is not None:
            hidden = self._enter(hidden)
            arguments = self._follow(arguments, block, hidden)
        self._caught = {}
        output = block.forward(hidden, **arguments)
        if not isinstance(output, Tensor):
            raise UnsupportedModel(
                f"{type(block.block).__name__} gave {type(output).__name__} in place of hidden "
                "states: stages inside it are not supported."
            )
        for cut in cuts:
            with self.stopwatch.running(output.device):
                output = self._cut(output, cut, block.attention)
        self._caught = {}
        if self._trail is None or block.index not in self._exposed:
            return output
        self._shorter, self._shown = output, self._restore(output)
        return self._shown

    def catch(self, name: str, output: Tensor) -> None:
        """Keep queries or keys of the block under way."""
        self._caught[name] = output

    def release(self) -> None:
        """Let go of features when the encoding is over."""
        self._caught, self._shorter, self._shown, self._bias = {}, None, None, None

    def attention_mask(self, hidden: Tensor, attention: Any) -> Tensor | None:
        """``(B, 1, 1, S)`` additive: log sizes of merged tokens, and what pads unequal sequences.

        Raises:
            UnsupportedModel: if the attention kernel takes no mask.
        """
        if self._trail is None or (self._sizes is None and len(set(self._counts)) == 1):
            return None
        if not takes_bias(attention):
            raise UnsupportedModel(
                f"the attention kernel of {type(attention).__name__} takes no additive mask, which "
                "merged tokens need (attention is proportional to how many patches they stand "
                "for). Load the model with attn_implementation='sdpa'."
            )
        if self._bias is None:
            self._bias = self._log_sizes(self._trail)
        return self._bias.to(hidden.dtype)

    # -- the shorter sequence ------------------------------------------------------------------

    def _begin(self, hidden: Tensor) -> None:
        if self._sequences is not None:
            raise UnsupportedModel(
                "the encoder ran twice in one encoding call: stages inside it cannot tell which of "
                "the two the features are of."
            )
        self._sequences = self._describe(hidden.shape[0], hidden.shape[1])
        lengths = [len(layout) for layout in self._sequences.layouts]
        self._plan = plan_cuts(self.stages, self._depth, lengths, self._sequences.owners)

    def _start(self, units: Tensor) -> tuple[Tensor, Trail]:
        """The units before the first cut, without what pads them."""
        sequences = self.sequences
        self._counts = [len(layout) for layout in sequences.layouts]
        batch, count = units.shape[:2]
        places = torch.arange(count, device=units.device).expand(batch, -1)
        if sequences.valid is None:
            return units, Trail(places, places, ("",) * batch)
        valid = sequences.valid.to(units.device)
        first = (~valid).long().argsort(dim=1, stable=True)
        assignment = torch.where(valid, valid.long().cumsum(1) - 1, DROPPED)
        positions = first[:, : max(self._counts)]
        return gather_tokens(units, positions), Trail(assignment, positions, ("",) * batch)

    def _enter(self, hidden: Tensor) -> Tensor:
        """The shorter sequence; a block after an exposed one is given the full one."""
        sequences, trail = self.sequences, self._trail
        shorter, shown, self._shorter, self._shown = self._shorter, self._shown, None, None
        if shorter is not None and hidden is shown:
            return shorter
        if trail is None or hidden.shape[1] == self._length(trail):
            return hidden
        # A copy of the full sequence: accelerate moved it to the device of this block.
        units = gather_tokens(self._in_units(hidden, ordered=False), trail.positions)
        patches = units.reshape(units.shape[0], -1, hidden.shape[2])
        return torch.cat([hidden[:, : sequences.prefix], patches], dim=1)

    def _length(self, trail: Trail) -> int:
        return self.sequences.prefix + trail.positions.shape[1] * self.sequences.unit

    def _in_units(self, per_token: Tensor, *, ordered: bool) -> Tensor:
        """``(B, N, unit C)`` the units of a tensor ``(B, S, C)``.

        Args:
            per_token: one entry for each token of the sequence.
            ordered: whether the patches of a unit are next to each other, as they are after a cut.
        """
        sequences = self.sequences
        patches = per_token[:, sequences.prefix :] if sequences.prefix else per_token
        if sequences.order is not None and not ordered:
            patches = patches.index_select(1, sequences.order.to(patches.device))
        if sequences.unit == 1:
            return patches
        return patches.reshape(patches.shape[0], -1, sequences.unit * patches.shape[2])

    def _cut(self, hidden: Tensor, cut: Cut, attention: Any) -> Tensor:
        trail, first = self._trail, self._trail is None
        units = self._in_units(hidden, ordered=not first)
        signals = self._read_signals(hidden, attention)
        if trail is None:
            units, trail = self._start(units)
            if self.sequences.valid is not None:
                signals = {n: gather_tokens(s, trail.positions) for n, s in signals.items()}
        buckets: dict[object, list[int]] = {}
        for row, (reducer, count) in enumerate(zip(cut.reducers, self._counts, strict=True)):
            alone = row if reducer.count_class == "adaptive" else None
            layout = self.sequences.layouts[row] if first else Layout.line(count)
            buckets.setdefault((layout.key, reducer, alone), []).append(row)
        done = []
        for rows in buckets.values():
            count, reducer = self._counts[rows[0]], cut.reducers[rows[0]]
            layout = self.sequences.layouts[rows[0]] if first else Layout.line(count)
            everyone = len(rows) == len(self._counts) and count == units.shape[1]

            def of(tensor: Tensor, everyone: bool = everyone, rows: list[int] = rows) -> Tensor:
                return tensor if everyone else tensor[rows]

            tokens = VisualTokens(
                of(units)[:, :count],
                layout,
                sizes=None if self._sizes is None else of(self._sizes)[:, :count],
                signals={name: of(signal)[:, :count] for name, signal in signals.items()},
            )
            done.append((rows, reducer(tokens)))
        return self._advance(hidden, cut, units, trail, done)

    def _advance(
        self,
        hidden: Tensor,
        cut: Cut,
        units: Tensor,
        trail: Trail,
        done: list[tuple[list[int], Reduction]],
    ) -> Tensor:
        """The sequence that the reductions of its rows leave."""
        width = max(reduction.kept for _, reduction in done)
        sizes = None
        if self._sizes is not None or any(not r.gathers for _, r in done):
            sizes = _stack(
                done,
                width,
                [
                    r.group_sizes(None if self._sizes is None else self._sizes[i, : r.source_count])
                    for i, r in done
                ],
                fill=1.0,
            )
        positions = _stack(done, width, [r.positions for _, r in done])
        groups = _stack(done, trail.positions.shape[1], [r.assignment for _, r in done], DROPPED)
        shorter = _stack(done, width, [r.features for _, r in done])
        reasons, counts = list(trail.reasons), list(self._counts)
        for rows, reduction in done:
            for row in rows:
                reasons[row], counts[row] = reduction.reason, reduction.kept
        self._trail = self.trails[cut.stage] = Trail(
            torch.where(
                trail.assignment < 0, DROPPED, groups.gather(1, trail.assignment.clamp(min=0))
            ),
            trail.positions.gather(1, positions),
            tuple(reasons),
        )
        self._sizes, self._counts, self._bias, self._patches = sizes, counts, None, None
        sequences = self.sequences
        shorter = shorter.reshape(shorter.shape[0], width * sequences.unit, hidden.shape[2])
        if sequences.prefix:
            return torch.cat([hidden[:, : sequences.prefix], shorter], dim=1)
        return shorter

    def _restore(self, hidden: Tensor) -> Tensor:
        """The full sequence: each token shows what it flowed into."""
        sequences, trail = self.sequences, self._trail
        if trail is None:
            return hidden
        full = gather_tokens(self._in_units(hidden, ordered=True), trail.assignment.clamp(min=0))
        full = full.masked_fill((trail.assignment < 0)[..., None], 0)
        full = full.reshape(full.shape[0], -1, hidden.shape[2])
        if sequences.order is not None:
            full = full.index_select(1, sequences.order.argsort().to(full.device))
        if sequences.prefix:
            full = torch.cat([hidden[:, : sequences.prefix], full], dim=1)
        return full

    # -- what blocks are given beside the hidden states ------------------------------------------

    def _follow(
        self, arguments: dict[str, Any], block: BlockCall, hidden: Tensor
    ) -> dict[str, Any]:
        """The arguments with masks and rotary embeddings of the tokens that are left."""
        if arguments.get("is_causal"):
            raise UnsupportedModel("causal attention in an encoder cannot follow merged tokens.")
        arguments = dict(arguments)
        if block.mask is not None:
            mask = self.attention_mask(hidden, block.attention)
            given = arguments.get(block.mask)
            if given is not None:
                given = self._gather_mask(given, hidden.dtype)
                mask = given if mask is None else given + mask
            if mask is not None:
                arguments[block.mask] = mask
        rope = arguments.get("rope")
        if rope is not None:
            patches = self._patch_index()
            while rope.ndim < 4:
                rope = rope[None]
            arguments["rope"] = rope.take_along_dim(patches[:, None, :, None], dim=2)
        return arguments

    def _patch_index(self) -> Tensor:
        """``(B, n)`` the source patch that each patch of the shorter sequence stands at."""
        sequences, trail = self.sequences, self._trail
        if self._patches is None and trail is not None:
            slots = torch.arange(sequences.unit, device=trail.positions.device)
            patches = (trail.positions[..., None] * sequences.unit + slots).flatten(1)
            if sequences.order is not None:
                patches = sequences.order.to(patches.device)[patches]
            self._patches = patches
        if self._patches is None:
            raise StageNotEngaged("nothing was cut yet.")
        return self._patches

    def _gather_mask(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A mask ``(B, H, S or 1, S)`` that the model made, for the tokens that are left."""
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        patches, prefix = self._patch_index(), self.sequences.prefix
        first = torch.arange(prefix, device=patches.device).expand(patches.shape[0], -1)
        index = torch.cat([first, patches + prefix], dim=1)
        while mask.ndim < 4:
            mask = mask[None]
        mask = mask.take_along_dim(index[:, None, None, :], dim=3)
        if mask.shape[2] > 1:
            mask = mask.take_along_dim(index[:, None, :, None], dim=2)
        return mask

    def _log_sizes(self, trail: Trail) -> Tensor:
        sequences, shape, device = self.sequences, trail.positions.shape, trail.positions.device
        bias = torch.zeros(shape, device=device) if self._sizes is None else self._sizes.log()
        if len(set(self._counts)) > 1:
            counts = torch.tensor(self._counts, device=device)[:, None]
            bias = bias.masked_fill(torch.arange(shape[1], device=device) >= counts, -torch.inf)
        bias = bias.repeat_interleave(sequences.unit, dim=1)
        return torch.nn.functional.pad(bias, (sequences.prefix, 0))[:, None, None]

    def _read_signals(self, hidden: Tensor, attention: Any) -> dict[str, Tensor]:
        """Signals of the block under way, one entry for each unit.

        Keys are those before rotary embeddings, averaged over heads (as ToMe does) and over the
        patches of a unit.
        """
        signals: dict[str, Tensor] = {}
        unit = self.sequences.unit

        def per_unit(per_token: Tensor) -> Tensor:
            units = self._in_units(per_token, ordered=self._trail is not None)
            return units.reshape(*units.shape[:2], unit, -1).mean(2)

        if "keys" in self._caught:
            keys = per_head(self._caught["keys"], attention).detach()
            signals["keys"] = per_unit(keys.mean(1))
            if "class_attention" in self._signals:
                queries = per_head(self._caught["queries"], attention).detach()
                scale = getattr(attention, "scale", None) or attention.scaling
                logits = (queries[:, :, :1].float() @ keys.float().transpose(2, 3)) * scale
                bias = self.attention_mask(hidden, attention)
                if bias is not None:
                    logits = logits + bias.float()
                row = logits.softmax(-1).mean(1)[:, 0]
                signals["class_attention"] = per_unit(row[..., None])[..., 0]
        return signals


def _stack(
    done: Sequence[tuple[list[int], Reduction]],
    width: int,
    parts: Sequence[Tensor],
    fill: float = 0,
) -> Tensor:
    """The rows' tensors ``(b, m, ...)`` as one ``(B, width, ...)``, padded with ``fill``."""
    if len(parts) == 1 and parts[0].shape[1] == width:
        return parts[0]
    padded = [
        torch.nn.functional.pad(
            part, (0, 0) * (part.ndim - 2) + (0, width - part.shape[1]), value=fill
        )
        for part in parts
    ]
    rows = [row for rows, _ in done for row in rows]
    return torch.cat(padded)[sorted(range(len(rows)), key=rows.__getitem__)]
