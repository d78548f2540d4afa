"""Stages between the layers of the LLM: from some layer on, it computes and remembers fewer tokens.

Hooks before each layer from the first cut on shorten the hidden states there, and hand that layer
and those after it positions and a mask of the shorter sequence. Each layer's cache then holds what
the layer saw; which slots of the first layer those are is kept in the ledger, since masks are built
once, for the first layer.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenreduce.errors import UnsupportedSite
from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.packing import PackedTokens
from tokenreduce.receipt import Stopwatch
from tokenreduce.stage import ItemOutcome, Stage, keep_all_outcomes, run_stages
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.deepstack import shorten_deepstack
from tokenreduce_integrations.transformers.hooks import (
    Replacement,
    Uncopyable,
    outside_compilation,
    replace_method,
    restore_methods,
)
from tokenreduce_integrations.transformers.ledger import Slots
from tokenreduce_integrations.transformers.rows import RowProbe
from tokenreduce_integrations.transformers.sequence import (
    ReducedItem,
    SequencePlan,
    gather_outputs,
    text_row_positions,
)
from tokenreduce_integrations.transformers.watch import PlacedItem

_ATTENTION_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class LayerItem:
    """A visual item inside the LLM.

    Attributes:
        prompt: its row.
        columns: ``(N,)`` its columns in the sequence of the layer at hand.
        layout: where its tokens lie.
        sizes: ``(N,)`` float32, how many source tokens each stands for.
        entered: unprotected tokens that entered the first layer, which shares are of.
        outcome: what became of it inside the LLM so far.
    """

    prompt: int
    columns: Tensor
    layout: Layout
    sizes: Tensor
    entered: int = 0
    outcome: ItemOutcome = field(default_factory=lambda: ItemOutcome(reduction=None, stages=()))


class DepthRun:
    """One call of the LLM.

    Args:
        entered: the sequence that enters the first layer.
        past: what the cache holds before the call, by the layer where each depth begins.
        dtype: of the hidden states.
        items: the visual items that may be cut.
        stopwatch: counts the time of the stages.
    """

    def __init__(
        self,
        entered: Slots,
        past: Mapping[int, Slots],
        dtype: torch.dtype,
        items: Sequence[LayerItem] = (),
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self.items = list(items)
        self.stopwatch = stopwatch or Stopwatch()
        self.dtype = dtype
        self._past = past
        self._made: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        #: What each depth computes of the sequence that entered, by the layer where it begins.
        self.depths = {0: entered}
        self.cuts: list[tuple[SequencePlan, list[ReducedItem]]] = []

    @property
    def now(self) -> Slots:
        """What the layer at hand computes: columns of the sequence that entered."""
        return self.depths[max(self.depths)]

    @property
    def entered(self) -> Slots:
        """The sequence that entered the first layer."""
        return self.depths[0]

    def past(self, layer: int) -> Slots:
        """What a layer's cache held before the call."""
        return _at(self._past, layer)

    def differs_at(self, layer: int) -> bool:
        """Whether a layer computes or holds anything else than the first one does."""
        return len(self.depths) > 1 or self.past(layer) is not self._past[0]

    def once(self, name: str, layer: int, given: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives for an argument of a layer, shared by the layers of its depth."""
        depths = max(self.depths), max(depth for depth in self._past if depth <= layer)
        before = self._made.get((name, *depths))
        if before is not None and before[0] is given:
            return before[1]
        made = make()
        self._made[(name, *depths)] = given, made
        return made

    def plan_from(self, plan: SequencePlan | None) -> SequencePlan:
        """The sequence that leaves the last layer, as columns of the one that ``plan`` is of."""
        now = self.now
        columns = now.index if plan is None else plan.columns.gather(1, now.index)
        return SequencePlan(columns, now.valid)

    def deeper(self) -> dict[int, Slots]:
        """What the cache holds after the call, by the layer where each depth begins."""
        first = self._past[0].index.shape[1]
        return {
            depth: self.past(depth).followed_by(_at(self.depths, depth), first)
            for depth in sorted({*self._past, *self.depths} - {0})
        }

    def cut(self, layer: int, hidden: Tensor, stages: Sequence[Stage], probe: RowProbe) -> Tensor:
        """Apply the stages of a layer to the hidden states ``(B, S', D)`` that would enter it."""
        layouts = [item.layout for item in self.items]
        prompts = [item.prompt for item in self.items]
        entered = [item.entered for item in self.items]
        outcomes = keep_all_outcomes(stages, layouts, prompts, entered)
        if outcomes is None:
            with self.stopwatch.running(hidden.device):
                rows = torch.cat([torch.full_like(i.columns, i.prompt) for i in self.items])
                columns = torch.cat([item.columns for item in self.items])
                packed = PackedTokens(
                    features=hidden[rows, columns],
                    layouts=tuple(layouts),
                    sizes=torch.cat([item.sizes for item in self.items]),
                    signals=probe.signals(hidden, self.now.valid, self.items),
                )
                outcomes = run_stages(stages, packed, prompts, original=entered)
        reduced = [
            ReducedItem(item.prompt, item.columns, outcome.reduction)
            for item, outcome in zip(self.items, outcomes, strict=True)
        ]
        if all(outcome.reduction is None for outcome in outcomes):
            self.items = [
                _onward(item, outcome, None)
                for item, outcome in zip(self.items, outcomes, strict=True)
            ]
            return hidden
        with self.stopwatch.running(hidden.device):
            plan, hidden = gather_outputs(hidden, self.now.valid, reduced)
        place = _places(plan, self.now.valid.shape[1])
        self.items = [
            _onward(item, outcome, place)
            for item, outcome in zip(self.items, outcomes, strict=True)
        ]
        self.cuts.append((plan, reduced))
        columns = self.now.index.gather(1, plan.columns)
        self.depths[layer] = Slots(columns, plan.valid, full=bool(plan.valid.all()))
        return hidden


def _at(depths: Mapping[int, Slots], layer: int) -> Slots:
    return depths[max(depth for depth in depths if depth <= layer)]


def entering(
    items: Sequence[PlacedItem],
    outcomes: Sequence[ItemOutcome],
    plan: SequencePlan | None,
    given: Slots,
) -> list[LayerItem]:
    """The visual items as the first layer sees them.

    Args:
        items: as they lie in the given sequence.
        outcomes: what the stages before the LLM made of each.
        plan: the sequence that enters; None if it is the given one.
        given: the given sequence.

    Raises:
        UnsupportedSite: if the caller masked visual tokens out.
    """
    if not given.full and not all(bool(given.valid[i.prompt, i.columns].all()) for i in items):
        raise UnsupportedSite(
            "attention_mask hides visual tokens, which a stage at the decoder site would have to "
            "count. Leave the images out of the prompt, or use the projector site."
        )
    place = None if plan is None else _places(plan, given.valid.shape[1])
    unmarked = ItemOutcome(reduction=None, stages=())
    entered = []
    for item, outcome in zip(items, outcomes, strict=True):
        whole = LayerItem(
            prompt=item.prompt,
            columns=item.columns,
            layout=item.layout,
            sizes=torch.ones(len(item.layout), device=item.columns.device),
        )
        onward = _onward(whole, outcome, place)
        free = len(onward.layout) - onward.layout.protected_count
        entered.append(replace(onward, entered=free, outcome=unmarked))
    return entered


def _places(plan: SequencePlan, length: int) -> Tensor:
    """``(B, length)`` where each column of a sequence goes in the planned one; -1 nowhere."""
    place = torch.full((plan.columns.shape[0], length), -1, device=plan.columns.device)
    ranks = torch.arange(plan.columns.shape[1], device=place.device).expand_as(plan.columns)
    return place.scatter(1, plan.columns, ranks.where(plan.valid, -1))


def _onward(item: LayerItem, outcome: ItemOutcome, place: Tensor | None) -> LayerItem:
    """The item as the next layer sees it.

    Args:
        item: the item before.
        outcome: what the stages made of it.
        place: ``(B, S)`` where each column goes in the shorter sequence; None if it is the same.
    """
    columns, layout, sizes = item.columns, item.layout, item.sizes
    reduction = outcome.reduction
    if reduction is not None:
        kept = reduction.positions[0]
        columns, layout = columns[kept], layout.select(kept)
        sizes = reduction.group_sizes(sizes[None])[0]
    if place is not None:
        columns = place[item.prompt, columns]
    return replace(
        item,
        columns=columns,
        layout=layout,
        sizes=sizes,
        outcome=item.outcome.then(outcome),
    )


class _UnderWay(threading.local):
    """The call of the LLM under way; threads may share a model."""

    def __init__(self) -> None:
        self.run: DepthRun | None = None


def replays_hooks(layer: nn.Module) -> bool:
    """Whether activation checkpointing of a layer covers its hooks, not its forward alone."""
    return type(layer).__call__ is not nn.Module.__call__


class DecoderSite(Uncopyable):
    """Hooks before the layers of a decoder, from the first cut on.

    Args:
        decoder: the module that runs the LLM's layers.
        stages: the stages at the decoder site that act now; asked at every call.
        needs: after how many layers they cut, and the names of the signals that they read there.

    Raises:
        UnsupportedSite: if the decoder's layers cannot be cut between.
    """

    def __init__(
        self,
        decoder: Any,
        stages: Callable[[], tuple[Stage, ...]],
        needs: Mapping[int, Sequence[str]],
    ) -> None:
        check_depth(decoder, list(needs))
        self._decoder = decoder
        self._stages = stages
        self._under_way = _UnderWay()
        self._probes: dict[int, RowProbe] = {}
        with ExitStack() as undo:
            for layer, names in needs.items():
                probe = RowProbe(decoder.layers[layer - 1], names, self._is_prefill)
                undo.callback(probe.detach)
                self._probes[layer] = probe
            undo.pop_all()
        self._first = min(needs)
        self._signatures = [inspect.signature(layer.forward) for layer in decoder.layers]
        self._extra = [_var_keyword(signature) for signature in self._signatures]
        self._handles: list[RemovableHandle] = [
            decoder.layers[i].register_forward_pre_hook(self._hook(i), with_kwargs=True)
            for i in range(self._first, len(decoder.layers))
        ]
        self._replaced: list[Replacement] = []
        self._deepstack: Any = getattr(decoder, "_deepstack_process", None)
        if self._deepstack is not None:
            self._replaced.append(
                replace_method(decoder, "_deepstack_process", self._shortened_deepstack)
            )

    def reaches(self, layers: Collection[int]) -> bool:
        """Whether layers at these depths are hooked."""
        return all(layer >= self._first for layer in layers)

    def begin(self, run: DepthRun) -> None:
        """The decoder is about to run.

        Raises:
            UnsupportedSite: if its layers will run once more, hooks and all, in the backward pass.
        """
        layer = self._decoder.layers[0]
        checkpointing = layer.training and getattr(layer, "gradient_checkpointing", False)
        if checkpointing and replays_hooks(layer):
            raise UnsupportedSite(
                "activation checkpointing and stages at the decoder site: this release of "
                "transformers runs the layers' hooks again in the backward pass. Upgrade to "
                "transformers 5.23 or newer, switch checkpointing off, or use the projector site."
            )
        self._under_way.run = run

    def end(self) -> None:
        """The decoder has run, or failed."""
        self._under_way.run = None
        for probe in self._probes.values():
            probe.forget()

    def detach(self) -> None:
        """Remove every hook; detaching twice does nothing."""
        for handle in self._handles:
            handle.remove()
        for probe in self._probes.values():
            probe.detach()
        replaced, self._replaced = self._replaced, []
        restore_methods(replaced)

    def _is_prefill(self) -> bool:
        run = self._under_way.run
        return run is not None and bool(run.items)

    def _hook(self, layer: int) -> Callable[..., Any]:
        @outside_compilation
        def before_layer(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            run = self._under_way.run
            if run is None:
                return None
            bound = self._signatures[layer].bind(*args, **kwargs)
            given = bound.arguments
            changed = False
            stages: list[Stage] = []
            if run.items:
                stages = [stage.at(layer) for stage in self._stages() if layer in stage.layers]
            if stages:
                before = given["hidden_states"]
                given["hidden_states"] = run.cut(layer, before, stages, self._probes[layer])
                changed = given["hidden_states"] is not before
            if run.differs_at(layer):
                changed = True
                self._shorten(run, layer, given)
            return (bound.args, bound.kwargs) if changed else None

        return before_layer

    def _shorten(self, run: DepthRun, layer: int, given: dict[str, Any]) -> None:
        """Give a layer the positions and the mask of the tokens that it computes and holds."""
        extra = given.get(self._extra[layer], {})
        for arguments in (given, extra):
            for name, value in arguments.items():
                if name not in ("hidden_states", self._extra[layer]):
                    arguments[name] = self._shorter(name, value, run, layer)

    def _shorter(self, name: str, value: Any, run: DepthRun, layer: int) -> Any:
        """An argument of the first layer as a deeper one needs it, computed once for its depth."""
        now = run.now
        if name == "attention_mask":
            return run.once(name, layer, value, lambda: self._mask(value, run, layer))
        if now is run.entered:
            return value
        if name == "position_ids" and isinstance(value, Tensor):
            # Feeds only the detection of packed samples, which takes a gap for a boundary.
            valid = run.past(layer).valid
            return run.once(name, layer, value, lambda: text_row_positions(now.valid, valid))
        if name.startswith("position_embeddings"):
            return run.once(name, layer, value, lambda: _gather_rotary(value, now.index))
        if isinstance(value, Tensor) and value.shape[:2] == run.entered.index.shape:
            return run.once(name, layer, value, lambda: gather_tokens(value, now.index))
        return value

    def _mask(self, mask: Any, run: DepthRun, layer: int) -> Tensor | None:
        now, past, first = run.now, run.past(layer), run.past(0).index.shape[1]
        full = now.full and past.full
        implementation = self._decoder.config._attn_implementation or "eager"
        if mask is None and full:
            return None
        if implementation.startswith("flash"):
            return None if full else torch.cat([past.valid, now.valid], dim=1).long()
        length = first + run.entered.index.shape[1]
        if mask is None:
            return causal_mask(past, now, None if implementation == "sdpa" else run.dtype)
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-1] != length:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedSite(
                f"the layers of {type(self._decoder).__name__} were given an attention mask of "
                f"{shape} for {length} tokens (a static cache, or a sliding window that is shorter "
                "than the sequence): stages at the decoder site cannot shorten it. Use the default "
                "dynamic cache, or the projector site."
            )
        return shorter_mask(mask, past, now, first)

    def _shortened_deepstack(self, hidden: Tensor, mask: Tensor, embeds: Tensor) -> Any:
        run = self._under_way.run
        for plan, items in run.cuts if run is not None else ():
            given = {"visual_pos_masks": mask, "deepstack_visual_embeds": [embeds]}
            shorter = shorten_deepstack(given, plan, items)
            mask, [embeds] = shorter["visual_pos_masks"], shorter["deepstack_visual_embeds"]
        return self._deepstack(hidden, mask, embeds)


def at_depth(decoder: Any, stage: Stage) -> Stage:
    """A stage whose shares of the depth are layers of a decoder.

    Raises:
        UnsupportedSite: if the decoder has no layers to count.
        PipelineError: if two shares come to the same layer.
    """
    if not stage.relative:
        return stage
    return stage.within(len(_layers(decoder)))


def check_depth(decoder: Any, layers: Sequence[int]) -> None:
    """Check that stages can act between the layers of a decoder.

    Raises:
        UnsupportedSite: naming what stands against it.
    """
    config, name = decoder.config, type(decoder).__name__
    count = len(_layers(decoder))
    beyond = [layer for layer in layers if layer >= count]
    if beyond:
        raise UnsupportedSite(
            f"a stage after layer {beyond[0]}: {name} has {count} layers, so that nothing would "
            f"come after it. The last place for a stage is layer={count - 1}."
        )
    running = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES)
    if running:
        raise UnsupportedSite(
            f"{name} has layers of type {', '.join(running)}, whose state cannot forget tokens: "
            "stages at the decoder site do not serve it. Use the projector site."
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise UnsupportedSite(
            f"{name} mixes layers of type {', '.join(sorted(kinds))}: masks of each type are sized "
            "by its first layer, which a stage before that layer would make shorter than the "
            "others. Use the projector site."
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise UnsupportedSite(
            f"{name} shares keys and values between layers, which a stage between them would make "
            "differ in length. Use the projector site."
        )
    implementation = config._attn_implementation or "eager"
    if implementation not in ("eager", "sdpa") and not implementation.startswith("flash"):
        raise UnsupportedSite(
            f"attention {implementation!r} of {name}: stages at the decoder site serve eager, sdpa "
            "and flash_attention_2 or later. Load the model with attn_implementation='sdpa'."
        )


def _var_keyword(signature: inspect.Signature) -> str:
    """The name under which further keyword arguments are collected; empty without one."""
    kinds = ((name, parameter.kind) for name, parameter in signature.parameters.items())
    return next((name for name, kind in kinds if kind is inspect.Parameter.VAR_KEYWORD), "")


def causal_mask(past: Slots, now: Slots, dtype: torch.dtype | None) -> Tensor:
    """The mask ``(B, 1, S, L + S)`` of a sequence that follows cached slots.

    Args:
        past: the L cached slots.
        now: the S tokens.
        dtype: type of an additive mask; None for a boolean one.
    """
    keys = torch.cat([past.valid, now.valid], dim=1)
    queries, held = now.valid.shape[1], keys.shape[1]
    seen = torch.ones(queries, held, dtype=torch.bool, device=keys.device).tril(held - queries)
    mask = _padding_sees_itself(seen & keys[:, None, None], now)
    if dtype is None:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def shorter_mask(mask: Tensor, past: Slots, now: Slots, first: int) -> Tensor:
    """Rows and columns of the first layer's mask.

    Args:
        mask: ``(B or 1, 1 or H, S, first + S)``, boolean or additive.
        past: the slots that the layer holds.
        now: the tokens that it computes.
        first: number of slots that the first layer holds.

    Returns:
        ``(B, 1 or H, S', L' + S')``.
    """
    keys = torch.cat([past.valid, now.valid], dim=1)[:, None, None]
    columns = torch.cat([past.index, first + now.index], dim=1)[:, None, None]
    rows = now.index[:, None, :, None]
    batch, heads = keys.shape[0], mask.shape[1]
    mask = mask.expand(batch, -1, -1, -1)
    mask = mask.gather(2, rows.expand(-1, heads, -1, mask.shape[3]))
    mask = mask.gather(3, columns.expand(-1, heads, mask.shape[2], -1))
    if mask.dtype == torch.bool:
        return _padding_sees_itself(mask & keys, now)
    return mask.masked_fill(~keys, torch.finfo(mask.dtype).min)


def _padding_sees_itself(mask: Tensor, now: Slots) -> Tensor:
    """Let rows of padding see themselves: one that sees nothing would be NaN in some kernels."""
    queries, held = mask.shape[-2:]
    itself = torch.eye(queries, dtype=torch.bool, device=mask.device)
    itself = nn.functional.pad(itself, (held - queries, 0))
    return mask | (itself & ~now.valid[:, None, :, None])


def _gather_rotary(embeddings: Any, index: Tensor) -> Any:
    """Rotary embeddings ``(..., B or 1, S, D)`` of some tokens, in whatever they are nested."""
    if isinstance(embeddings, Tensor):
        lead = embeddings.shape[:-3]
        wide = embeddings.expand(*lead, index.shape[0], -1, -1)
        return wide.gather(-2, index[..., None].expand(*lead, -1, -1, embeddings.shape[-1]))
    if isinstance(embeddings, Mapping):
        return {name: _gather_rotary(value, index) for name, value in embeddings.items()}
    if isinstance(embeddings, tuple | list):
        return type(embeddings)(_gather_rotary(value, index) for value in embeddings)
    return embeddings


def _layers(decoder: Any) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedSite(
            f"{type(decoder).__name__} has no layers that stages at the decoder site could act "
            "between: visual tokens go into an encoder here. Use the projector site."
        )
    return layers
