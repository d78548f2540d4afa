"""Stages on a live transformers model: two hooks on the text decoder, a watch on the module that
owns the visual features, and a ledger on the key-value cache.

Nothing is patched on a class, positions stay those of the full sequence, and when nothing is
reduced the decoder is called exactly as it would be without the attachment.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.attachment import Attachment, ItemReduction
from tokenreduce.capabilities import Site
from tokenreduce.errors import (
    AttachmentError,
    MediaError,
    StageNotEngaged,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce.packing import PackedTokens
from tokenreduce.plugins import installed
from tokenreduce.receipt import ItemReceipt, Receipt, Stopwatch, notify_observers
from tokenreduce.stage import (
    ItemOutcome,
    Stage,
    keep_all_outcomes,
    run_stages,
    unchanged_outcomes,
)
from tokenreduce_integrations.transformers.depth import DecoderSite, DepthRun, entering
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.generation import GenerateWatch, refuse_generation
from tokenreduce_integrations.transformers.hooks import Uncopyable, outside_compilation
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_by_layer
from tokenreduce_integrations.transformers.ledger import Given, Ledger, Slots
from tokenreduce_integrations.transformers.masks import BuiltMask, is_built
from tokenreduce_integrations.transformers.prompts import PROMPT_SIGNALS, PromptReader
from tokenreduce_integrations.transformers.sequence import (
    ReducedItem,
    SequencePlan,
    gather_outputs,
    gather_positions,
    restore_length,
    text_row_positions,
)
from tokenreduce_integrations.transformers.watch import EncoderSite, VisualInput, VisualWatch

_SEQUENCE_ARGUMENTS = {"inputs_embeds", "input_ids", "attention_mask", "position_ids"}


@dataclass(frozen=True)
class Choice:
    """What the stages before the LLM made of the visual items of a batch of prompts."""

    visual: VisualInput
    outcomes: list[ItemOutcome]
    stopwatch: Stopwatch

    @property
    def reduces(self) -> bool:
        return any(outcome.reduction is not None for outcome in self.outcomes)

    @property
    def items(self) -> list[ReducedItem]:
        return [
            ReducedItem(item.prompt, item.columns, outcome.reduction)
            for item, outcome in zip(self.visual.items, self.outcomes, strict=True)
        ]


@dataclass(frozen=True)
class _Call:
    """What the hook after the decoder needs of the one before it.

    Attributes:
        given: what the caller gave.
        plan: the sequence that entered the decoder; None if it is the given one.
        entered: the slots of that sequence.
        cache: the caller's cache, where the decoder was given a view of it; else None.
        choice: what the stages before the LLM made of the visual items, if some are cut between
            its layers too.
        run: what happens between the layers; None if nothing does.
    """

    given: Given
    plan: SequencePlan | None
    entered: Slots
    cache: Any
    choice: Choice | None
    run: DepthRun | None

    def ledger(self, plan: SequencePlan | None, deeper: Mapping[int, Slots]) -> Ledger:
        """The bookkeeping of the cache when the call is over.

        Args:
            plan: the sequence that left the decoder; None if it is the given one.
            deeper: what layers hold from some layer on, where that is less.
        """
        given, before = self.given, self.given.ledger
        slots = given.held.valid.shape[1]
        held = given.held.followed_by(self.entered, slots)
        length = given.slots.valid.shape[1]
        firm: Tensor | int = 0 if before is None else before.firm
        if plan is not None:
            firm = slots + self.entered.valid.shape[1] - plan.tail(length)
        return Ledger(held.valid, given.past + length, full=held.full, firm=firm, deeper=deeper)


class _UnderWay(threading.local):
    """The call of the decoder under way; threads may share a model."""

    def __init__(self) -> None:
        self.call: _Call | None = None


class TransformersAttachment(Uncopyable, Attachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    While attached, ``hidden_states`` and ``attentions`` that the model returns are those of the
    shorter sequence; ``logits`` and the loss have the shape of the given one. A cache made while
    attached must be continued while attached. Threads may share the model; ``receipt`` and
    ``reductions`` are those of whichever prefill came last.
    """

    _refuse_generation = staticmethod(refuse_generation)

    def __init__(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        family: Family,
        decoder: Any,
        owner: Any,
        tokenizer: Any | None = None,
        joint: JointEncoder | None = None,
    ) -> None:
        super().__init__(model, stages)
        if attachment_of(decoder) is not None:
            raise AttachmentError(
                f"a pipeline is attached to this {type(model).__name__} already. Detach it first, "
                "or attach one pipeline with several stages."
            )
        self.family = family
        self.decoder = decoder
        self.owner = owner
        needs = _needs(stages, "projector")
        self._prompts = PromptReader(needs, tokenizer, joint)
        self._encoder_needs = tuple(name for name in needs if name not in PROMPT_SIGNALS)
        self._under_way = _UnderWay()
        rotary = getattr(decoder, "rotary_emb", None)
        self._axes = len(getattr(rotary, "mrope_section", None) or (0, 0, 0))
        self._depth: DecoderSite | None = None
        inside = [stage for stage in stages if stage.site == "decoder"]
        layers = sorted({layer for stage in inside for layer in stage.layers})
        with ExitStack() as undo:
            self._watch = self._make_watch(joint)
            undo.callback(self._watch.detach)
            if layers:
                read = {n: _needs([s for s in inside if n in s.layers], "decoder") for n in layers}
                self._depth = DecoderSite(decoder, lambda: self._stages_at("decoder"), read)
                undo.callback(self._depth.detach)
            self._generate_watch = GenerateWatch(model, self._refuse_generation)
            self._handles = [
                decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
                decoder.register_forward_hook(self._after_decoder, always_call=True),
            ]
            undo.pop_all()

    def _make_watch(self, joint: JointEncoder | None) -> Any:
        """What tells of the visual items of a call."""
        with ExitStack() as undo:
            site = self._encoder_site(self.owner)
            if site is not None:
                undo.callback(site.detach)
            probe = None
            if self._encoder_needs and self.family.probe is not None:
                probe = self.family.probe(self.owner, self._encoder_needs, joint)
                undo.callback(probe.detach)
            watch = VisualWatch(self.owner, self.family, probe, site)
            undo.pop_all()
        return watch

    def detach(self) -> None:
        """See :meth:`tokenreduce.attachment.Attachment.detach`; detaching twice does nothing.

        Raises:
            AttachmentError: if another library wrapped the same methods since and its wrapper is
                still in place; everything else is removed all the same.
        """
        self.attached = False
        for handle in self._handles:
            handle.remove()
        if self._depth is not None:
            self._depth.detach()
        try:
            self._watch.detach()
        finally:
            self._generate_watch.detach()

    def _encoder_site(self, owner: Any) -> EncoderSite | None:
        sites = dict.fromkeys(s.site for s in self.stages if s.site in ("frames", "vision"))
        if len(sites) > 1:
            raise UnsupportedSite(
                "stages at the sites 'frames' and 'vision' in one pipeline: the encoder's blocks "
                "would merge tokens of frames that they never see. Use one of the two, and a stage "
                "at the projector site."
            )
        if not sites:
            return None
        [site] = sites
        if site == "frames" and self._encoder_needs:
            raise UnsupportedSite(
                "a stage at the site 'frames', and one that reads "
                f"{', '.join(self._encoder_needs)} of the encoder, which would see some frames "
                "only. After choosing frames, use a strategy that reads projected features."
            )
        return self.family.encoder_sites[site](owner, lambda: self._stages_at(site))

    def _stages_at(self, site: Site) -> tuple[Stage, ...]:
        """The stages at a site that act now."""
        if not self.enabled:
            return ()
        return tuple(stage for stage in self.stages if stage.site == site)

    # -- the decoder ---------------------------------------------------------------------------

    @outside_compilation
    def _before_decoder(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._under_way.call = None
        if self._depth is not None:
            # What an interrupted call left: Ctrl-C skips the hook after the decoder.
            self._depth.end()
        return self._begin(self._watch.take(), args, kwargs)

    def _begin(
        self, visual: VisualInput | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with which the decoder is called instead; None for those that it has."""
        if visual is not None and self.enabled and self.regions:
            visual = self._with_regions(visual)
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        ledger = Ledger.of(cache)
        if embeds is not None and embeds.shape[1] == 0:
            raise MediaError(
                f"{type(self.model).__name__} was given an empty prompt: there is nothing to "
                "answer. Pass at least one token."
            )
        if visual is None and ledger is None:
            if embeds is not None and Ledger.held(cache) == 0:
                self._record(None, [], embeds.shape[1], reason="a text-only turn")
            return None
        if embeds is None and kwargs.get("input_ids") is not None:
            embeds = self.decoder.get_input_embeddings()(kwargs["input_ids"])
            kwargs = {**kwargs, "input_ids": None, "inputs_embeds": embeds}
        if embeds is None:
            raise UnsupportedModel(
                f"{type(self.decoder).__name__} was called without inputs_embeds: the "
                f"{self.family.name} adapter does not serve it."
            )
        if visual is not None:
            visual = visual.expanded(embeds.shape[0])
        choice = None if visual is None else self._choose(visual, kwargs)
        cuts = choice is not None and self._depth is not None and self.enabled
        reduces = choice is not None and choice.reduces
        if choice is not None and not cuts and not reduces:
            self._record(choice, choice.outcomes, embeds.shape[1])
        if ledger is None and not cuts and not reduces:
            return None
        given = Given.of(embeds, kwargs.get("attention_mask"), cache)
        shorter, plan, entered = None, None, given.slots
        if ledger is not None or reduces:
            shorter, plan, entered = self._shortened(choice, given, kwargs)
        cut = choice if cuts else None
        run = self._between_layers(cut, cache, given, plan, entered, embeds.dtype)
        if shorter is None:
            self._under_way.call = _Call(given, plan, entered, None, cut, run)
            return None
        self._under_way.call = call = _Call(given, plan, entered, cache, cut, run)
        if cache is not None:
            call.ledger(plan, {} if ledger is None else ledger.deeper).install(cache)
            shorter["past_key_values"] = Ledger.view(cache)
        return args, shorter

    def _with_regions(self, visual: VisualInput) -> VisualInput:
        if any(stage.site == "vision" for stage in self.stages):
            raise UnsupportedSite(
                "regions cannot be protected where a stage inside the encoder drops or merges "
                "their tokens first: leave the regions out, or use stages at the projector site."
            )
        return replace(visual, regions=self.regions)

    def _choose(self, visual: VisualInput, kwargs: Mapping[str, Any]) -> Choice:
        """Choose and merge visual tokens; where budgets keep all, no tensor is read.

        Args:
            visual: the visual items of the call.
            kwargs: arguments of the decoder.
        """
        embeds: Tensor = kwargs["inputs_embeds"]
        layouts, earlier = visual.layouts, visual.earlier
        self._check_encoded(earlier)
        stages, stopwatch = self._stages_at("projector"), Stopwatch()
        if not self.enabled:
            outcomes = unchanged_outcomes(self.stages, layouts, "the attachment is disabled")
            return Choice(visual, outcomes, stopwatch)
        per_prompt = any(stage.total is not None for stage in stages)
        prompts = visual.prompts if per_prompt else [0] * len(layouts)
        unchanged = keep_all_outcomes(stages, layouts, prompts, earlier=earlier)
        if unchanged is not None:
            return Choice(visual, unchanged, stopwatch)
        with stopwatch.running(embeds.device):
            rows = torch.cat([torch.full_like(i.columns, i.prompt) for i in visual.items])
            columns = torch.cat([item.columns for item in visual.items])
            packed = PackedTokens(
                features=self.family.seen(kwargs, rows, columns),
                layouts=layouts,
                signals={
                    **visual.signals(self._encoder_needs),
                    **self._prompts.read(visual, kwargs),
                },
            )
            outcomes = run_stages(stages, packed, visual.prompts, earlier=earlier)
        return Choice(visual, outcomes, stopwatch)

    def _check_encoded(self, earlier: Sequence[ItemOutcome] | None) -> None:
        """Refuse features that were encoded under other stages than those that act now.

        Raises:
            StageNotEngaged: if stages before or inside the encoder never saw them.
            AttachmentError: if such stages left something out that nobody is to leave out now.
        """
        sites = [stage.site for stage in self.stages if stage.site in ("frames", "vision")]
        if self.enabled and sites and earlier is None:
            raise StageNotEngaged(
                f"visual features were encoded before the pipeline was attached, or while it was "
                f"disabled: its stage at the site {sites[0]!r} never saw them. Encode them again."
            )
        left_out = any(outcome.reduction is not None for outcome in earlier or ())
        if self.enabled and left_out and not sites:
            raise AttachmentError(
                "visual features were encoded while a pipeline with stages before or inside the "
                "encoder was attached, and lack what those left out. Encode them again."
            )
        if not self.enabled and left_out:
            raise AttachmentError(
                "the attachment is disabled, but visual features were encoded while it was not, "
                "and lack what its stages left out. Encode them again."
            )

    def _shortened(
        self,
        choice: Choice | None,
        given: Given,
        kwargs: Mapping[str, Any],
    ) -> tuple[dict[str, Any], SequencePlan | None, Slots]:
        """The arguments of the decoder for the shorter sequence, and that sequence."""
        shorter, plan, entered = dict(kwargs), None, given.slots
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        length = embeds.shape[1]
        if choice is not None and choice.reduces:
            with choice.stopwatch.running(embeds.device):
                items = choice.items
                plan, shorter["inputs_embeds"] = gather_outputs(embeds, given.slots.valid, items)
            if self.family.shorten is not None:
                shorter.update(self.family.shorten(kwargs, plan, items))
            self._refuse_unknown(kwargs, shorter, cache, *embeds.shape[:2])
            entered = Slots.entered(plan.valid, full=bool(plan.valid.all()))
            if self._depth is None:
                self._record(choice, choice.outcomes, length, plan.columns.shape[1])
        mask, position_ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if position_ids is None and self.family.counts_positions and isinstance(mask, Tensor):
            position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
        shorter["position_ids"] = _positions(position_ids, plan, given, self._axes)
        # Without a cache, a missing mask and gaps in the positions would be taken for packed
        # samples; with one, a missing mask is safe and spares the decoder a mask.
        safe = cache is not None and not cache.is_compileable
        full = given.held.full and entered.full
        valid = torch.cat([given.held.valid, entered.valid], dim=1)
        shorter["attention_mask"] = None if safe and full else valid.long()
        if self.family.mask is not None and is_built(mask):
            shorter["attention_mask"] = self.family.mask(
                BuiltMask(
                    given=mask,
                    config=self.decoder.config,
                    embeds=shorter["inputs_embeds"],
                    valid=valid,
                    plan=plan,
                    past=given.past,
                    length=length,
                    cache=None if cache is None else Ledger.view(cache),
                )
            )
        return shorter, plan, entered

    def _between_layers(
        self,
        choice: Choice | None,
        cache: Any,
        given: Given,
        plan: SequencePlan | None,
        entered: Slots,
        dtype: torch.dtype,
    ) -> DepthRun | None:
        """Get ready for stages between the layers, and for what they left in the cache."""
        ledger = Ledger.of(cache)
        deeper = {} if ledger is None else ledger.deeper
        if self._depth is None or not self._depth.reaches(deeper):
            if deeper:
                raise AttachmentError(
                    "this cache was shortened between the layers of the LLM by a pipeline with "
                    f"stages after layers {', '.join(map(str, sorted(deeper)))}: continue it with "
                    "that pipeline attached, or start with a new cache."
                )
            return None
        if choice is None and not deeper:
            return None
        if cache is not None and cache.is_compileable:
            raise UnsupportedSite(
                "a static cache and stages at the decoder site: its layers would have to differ in "
                "length. Use the default dynamic cache, or the projector site."
            )
        past = {0: given.held}
        past |= {n: slots.first(Ledger.held(cache, n)) for n, slots in deeper.items()}
        run = DepthRun(entered, past, dtype)
        if choice is not None:
            items = entering(choice.visual.items, choice.outcomes, plan, given.slots)
            run = DepthRun(entered, past, dtype, items, choice.stopwatch)
        self._depth.begin(run)
        return run

    def _refuse_unknown(
        self,
        given: Mapping[str, Any],
        shorter: Mapping[str, Any],
        cache: Any,
        batch: int,
        length: int,
    ) -> None:
        """Refuse what would be longer than the sequence, rather than compute nonsense.

        Raises:
            UnsupportedModel: naming the argument.
        """
        for name, value in given.items():
            if name in _SEQUENCE_ARGUMENTS or shorter.get(name) is not value:
                continue
            if isinstance(value, Tensor) and tuple(value.shape[:2]) == (batch, length):
                raise UnsupportedModel(
                    f"{type(self.decoder).__name__} also reads {name!r}, one entry for each token: "
                    f"the {self.family.name} adapter cannot shorten it."
                )
        built = self.family.mask is None and is_built(given.get("attention_mask"))
        if built and not (cache is not None and cache.is_compileable):
            raise UnsupportedModel(
                f"the decoder of {type(self.model).__name__} was given a finished attention mask, "
                f"which the {self.family.name} adapter cannot shorten. If you passed it, pass a "
                "mask of shape (batch, sequence) instead."
            )

    @outside_compilation
    def _after_decoder(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._under_way.call = self._under_way.call, None
        if self._depth is not None:
            self._depth.end()
        if call is None or output is None:
            return None
        if call.cache is not None:
            output.past_key_values = call.cache
        plan, run = call.plan, call.run
        if run is not None and run.cuts:
            plan = run.plan_from(plan)
        deeper = {} if run is None else run.deeper()
        cache = getattr(output, "past_key_values", None)
        if cache is not None and (call.given.ledger is not None or plan is not None):
            call.ledger(plan, deeper).install(cache)
        if plan is not None:
            output.last_hidden_state = restore_length(
                output.last_hidden_state, plan, call.given.slots.valid.shape[1]
            )
        if call.choice is not None and run is not None:
            outcomes = [
                done.then(item.outcome)
                for done, item in zip(call.choice.outcomes, run.items, strict=True)
            ]
            sizes = call.given.slots.valid.shape[1], call.entered.valid.shape[1]
            self._record(call.choice, outcomes, *sizes)
        return output

    # -- receipts --------------------------------------------------------------------------------

    def _record(
        self,
        choice: Choice | None,
        outcomes: Sequence[ItemOutcome],
        sequence_in: int,
        sequence_out: int | None = None,
        *,
        reason: str = "",
    ) -> None:
        """Keep what happened, to be read when it is asked for: reading waits for the device."""

        def make() -> tuple[Receipt, tuple[ItemReduction, ...]]:
            items = () if choice is None else choice.visual.items
            receipt = Receipt(
                items=tuple(
                    ItemReceipt(prompt=item.prompt, modality=item.modality, stages=outcome.stages)
                    for item, outcome in zip(items, outcomes, strict=True)
                ),
                sequence_in=sequence_in,
                sequence_out=sequence_in if sequence_out is None else sequence_out,
                layers=self.decoder.config.num_hidden_layers,
                kv_bytes_by_layer=kv_bytes_by_layer(self.decoder),
                stopwatch=Stopwatch() if choice is None else choice.stopwatch,
                reason=reason or _common_reason(outcomes),
            )
            reductions = tuple(
                ItemReduction(
                    prompt=item.prompt,
                    modality=item.modality,
                    columns=item.columns,
                    layout=item.layout,
                    reduction=outcome.reduction,
                )
                for item, outcome in zip(items, outcomes, strict=True)
            )
            return receipt, reductions

        self._make_record = make
        if installed().observers:
            notify_observers(self.receipt)


def attachment_of(decoder: nn.Module) -> TransformersAttachment | None:
    """The attachment on a decoder, or None."""
    for hook in decoder._forward_pre_hooks.values():
        holder = getattr(hook, "__self__", None)
        if isinstance(holder, TransformersAttachment):
            return holder
    return None


def _needs(stages: Sequence[Stage], site: Site) -> tuple[str, ...]:
    """Names of the signals that stages at a site read."""
    mine = (stage.reducer for stage in stages if stage.site == site)
    return tuple(dict.fromkeys(name for reducer in mine for name in reducer.needs))


def _positions(
    position_ids: Tensor | None, plan: SequencePlan | None, given: Given, axes: int
) -> Tensor:
    """Original positions: explicit even where the model would count them by itself.

    Beside the ``axes`` of multimodal rotary embeddings, a first row may hold the text's positions.
    """
    if position_ids is None:
        position_ids = (given.past + given.slots.index)[:1]
    if plan is None:
        return position_ids
    position_ids = gather_positions(position_ids, plan)
    if position_ids.ndim == 3 and position_ids.shape[0] == axes + 1:
        position_ids = position_ids.clone()
        position_ids[0] = text_row_positions(plan.valid, given.held.valid)
    return position_ids


def _common_reason(outcomes: Sequence[ItemOutcome]) -> str:
    """Why nothing was reduced, if nothing was."""
    done = [stage for outcome in outcomes for stage in outcome.stages]
    if any(stage.tokens_out < stage.tokens_in for stage in done):
        return ""
    reasons = (stage.reason for outcome in outcomes for stage in outcome.stages[-1:])
    return "; ".join(dict.fromkeys(reasons))
