"""Stages on a live transformers model: two hooks on the text decoder, a watch on the module that
owns the visual features, and a ledger on the key-value cache.

Nothing is patched on a class, positions stay those of the full sequence, and when nothing is
reduced the decoder is called exactly as it would be without the attachment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.attachment import Attachment, ItemReduction
from tokenreduce.capabilities import Site
from tokenreduce.errors import AttachmentError, MediaError, UnsupportedModel, UnsupportedSite
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
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.hooks import Uncopyable, outside_compilation
from tokenreduce_integrations.transformers.ledger import Ledger
from tokenreduce_integrations.transformers.sequence import (
    ReducedItem,
    SequencePlan,
    gather_positions,
    plan_sequence,
    query_mask,
    restore_length,
    text_row_positions,
)
from tokenreduce_integrations.transformers.watch import (
    EncoderSite,
    VisualInput,
    VisualWatch,
)

_SEQUENCE_ARGUMENTS = {"inputs_embeds", "input_ids", "attention_mask", "position_ids"}


@dataclass(frozen=True)
class _Choice:
    """What the stages made of the visual items of a batch of prompts.

    ``rows`` and ``columns`` say where all items' tokens lie, end to end.
    """

    items: list[ReducedItem]
    outcomes: list[ItemOutcome]
    rows: Tensor
    columns: Tensor
    stopwatch: Stopwatch


@dataclass(frozen=True)
class _Call:
    """What the hook after the decoder needs of the one before it."""

    plan: SequencePlan | None
    length: int
    before: Ledger | None
    after: Ledger


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

    def __init__(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        family: Family,
        decoder: Any,
        owner: Any,
    ) -> None:
        super().__init__(model, stages)
        if attachment_of(decoder) is not None:
            raise AttachmentError(
                f"a pipeline is attached to this {type(model).__name__} already. Detach it first, "
                "or attach one pipeline with several stages."
            )
        self.family = family
        self.decoder = decoder
        self._needs = tuple(dict.fromkeys(name for s in stages for name in s.reducer.needs))
        self._under_way = _UnderWay()
        self._make_record: Callable[[], tuple[Receipt, tuple[ItemReduction, ...]]] | None = None
        self._watch = VisualWatch(owner, family, self._needs, self._encoder_site(owner))
        self._handles = [
            decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]

    def detach(self) -> None:
        """See :meth:`tokenreduce.attachment.Attachment.detach`; detaching twice does nothing.

        Raises:
            AttachmentError: if another library wrapped the same methods since and its wrapper is
                still in place; everything else is removed all the same.
        """
        for handle in self._handles:
            handle.remove()
        self._watch.detach()

    @property
    def receipt(self) -> Receipt:
        self._read_record()
        return super().receipt

    @property
    def reductions(self) -> tuple[ItemReduction, ...]:
        self._read_record()
        return super().reductions

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
        visual = self._watch.take()
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
        if embeds is None:
            raise UnsupportedModel(
                f"{type(self.decoder).__name__} was called without inputs_embeds: the "
                f"{self.family.name} adapter does not serve it."
            )
        choice = None if visual is None else self._choose(visual, embeds)
        if choice is None and ledger is None:
            return None
        return args, self._shortened(visual, choice, embeds, cache, ledger, kwargs)

    def _choose(self, visual: VisualInput, embeds: Tensor) -> _Choice | None:
        """Choose and merge visual tokens; None if all stay, which reads no tensor of the model."""
        layouts, earlier = visual.layouts, visual.earlier
        stages = self._stages_at("projector")
        per_prompt = any(stage.total is not None for stage in stages)
        unchanged: list[ItemOutcome] | None = None
        if not self.enabled:
            unchanged = unchanged_outcomes(self.stages, layouts, "the attachment is disabled")
        elif earlier is None:
            prompts = visual.prompts if per_prompt else [0] * len(layouts)
            unchanged = keep_all_outcomes(stages, layouts, prompts)
        if unchanged is not None:
            self._record(visual, unchanged, embeds.shape[1])
            return None
        rows = torch.cat([torch.full_like(i.columns, i.prompt) for i in visual.items])
        columns = torch.cat([item.columns for item in visual.items])
        stopwatch = Stopwatch()
        with stopwatch.running(embeds.device):
            packed = PackedTokens(
                features=embeds[rows, columns],
                layouts=layouts,
                signals=visual.signals(self._needs),
            )
            outcomes = run_stages(stages, packed, visual.prompts, earlier=earlier)
        if all(outcome.reduction is None for outcome in outcomes):
            self._record(visual, outcomes, embeds.shape[1], stopwatch=stopwatch)
            return None
        items = [
            ReducedItem(item.prompt, item.columns, outcome.reduction)
            for item, outcome in zip(visual.items, outcomes, strict=True)
        ]
        return _Choice(items, outcomes, rows, columns, stopwatch)

    def _shortened(
        self,
        visual: VisualInput | None,
        choice: _Choice | None,
        embeds: Tensor,
        cache: Any,
        ledger: Ledger | None,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The arguments of the decoder for the shorter sequence."""
        batch, length = embeds.shape[:2]
        held, mask = Ledger.held(cache), kwargs.get("attention_mask")
        if ledger is not None:
            past_valid, past = ledger.aligned(held, batch)
        elif held and isinstance(mask, Tensor) and mask.ndim == 2:
            past_valid, past = mask[:, :held].bool(), held
        else:
            past_valid, past = embeds.new_ones((batch, held), dtype=torch.bool), held
        tokens = query_mask(mask, past, batch, length)
        full = tokens is None and (ledger is None or ledger.full)
        if tokens is None:
            tokens = embeds.new_ones((batch, length), dtype=torch.bool)

        shorter = dict(kwargs)
        plan = None
        if choice is not None:
            with choice.stopwatch.running(embeds.device):
                plan, shorter["inputs_embeds"] = _gather_outputs(embeds, tokens, choice)
            if self.family.shorten is not None:
                shorter.update(self.family.shorten(kwargs, plan, choice.items))
            self._refuse_unknown(kwargs, shorter, cache, batch, length)
            full = bool(plan.valid.all()) and bool(past_valid.all())
            self._record(
                visual,
                choice.outcomes,
                length,
                sequence_out=plan.columns.shape[1],
                stopwatch=choice.stopwatch,
            )
        shorter["position_ids"] = _positions(
            kwargs.get("position_ids"), plan, past, past_valid, length, embeds.device
        )
        valid = torch.cat([past_valid, tokens if plan is None else plan.valid], dim=1)
        # Without a cache, a missing mask and gaps in the positions would be taken for packed
        # samples; with one, a missing mask is safe and spares the decoder a mask.
        safe = cache is not None and not cache.is_compileable
        shorter["attention_mask"] = None if safe and full else valid.long()
        self._under_way.call = _Call(plan, length, ledger, Ledger(valid, past + length, full=full))
        if ledger is not None:
            ledger.inside_decoder = True
        return shorter

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
        mask = given.get("attention_mask")
        built = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
        if built and not (cache is not None and cache.is_compileable):
            raise UnsupportedModel(
                f"{type(self.model).__name__} builds its own attention mask before the decoder: "
                f"the {self.family.name} adapter cannot shorten it."
            )

    @outside_compilation
    def _after_decoder(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._under_way.call = self._under_way.call, None
        if call is None:
            return None
        if call.before is not None:
            call.before.inside_decoder = False
        if output is None:
            return None
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            call.after.install(cache)
        if call.plan is not None:
            output.last_hidden_state = restore_length(
                output.last_hidden_state, call.plan, call.length
            )
        return output

    # -- receipts --------------------------------------------------------------------------------

    def _record(
        self,
        visual: VisualInput | None,
        outcomes: Sequence[ItemOutcome],
        sequence_in: int,
        *,
        sequence_out: int | None = None,
        stopwatch: Stopwatch | None = None,
        reason: str = "",
    ) -> None:
        """Keep what happened, to be read when it is asked for: reading waits for the device."""

        def make() -> tuple[Receipt, tuple[ItemReduction, ...]]:
            items = () if visual is None else visual.items
            receipt = Receipt(
                items=tuple(
                    ItemReceipt(prompt=item.prompt, modality=item.modality, stages=outcome.stages)
                    for item, outcome in zip(items, outcomes, strict=True)
                ),
                sequence_in=sequence_in,
                sequence_out=sequence_in if sequence_out is None else sequence_out,
                layers=self.decoder.config.num_hidden_layers,
                kv_bytes_per_token=_kv_bytes_per_token(self.decoder),
                stopwatch=stopwatch or Stopwatch(),
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

    def _read_record(self) -> None:
        if self._make_record is not None:
            (self._receipt, self._reductions), self._make_record = self._make_record(), None


def attachment_of(decoder: nn.Module) -> TransformersAttachment | None:
    """The attachment on a decoder, or None."""
    for hook in decoder._forward_pre_hooks.values():
        holder = getattr(hook, "__self__", None)
        if isinstance(holder, TransformersAttachment):
            return holder
    return None


def _gather_outputs(embeds: Tensor, tokens: Tensor, choice: _Choice) -> tuple[SequencePlan, Tensor]:
    """The shorter sequence: text, and what the stages left of the visual items.

    Args:
        embeds: ``(B, S, D)`` embeddings of the given sequence.
        tokens: ``(B, S)`` False where the caller padded.
        choice: what the stages chose.
    """
    rows, columns, merged = [], [], []
    for item in choice.items:
        reduction = item.reduction
        kept = item.columns if reduction is None else item.columns[reduction.positions[0]]
        owner = torch.full_like(kept, item.prompt)
        rows.append(owner)
        columns.append(kept)
        if reduction is not None and not reduction.gathers:
            merged.append((owner, kept, reduction.features[0]))
    keep = tokens.clone()
    keep[choice.rows, choice.columns] = False
    kept_rows, kept_columns = torch.cat(rows), torch.cat(columns)
    # What the caller masked out stays out, whatever a strategy chose.
    keep[kept_rows, kept_columns] = tokens[kept_rows, kept_columns]
    if merged:
        place_rows, place_columns, features = (
            torch.cat(parts) for parts in zip(*merged, strict=True)
        )
        embeds = embeds.index_put((place_rows, place_columns), features.to(embeds.dtype))
    pad_right = not bool(tokens[:, -1].all()) and bool(tokens[:, 0].all())
    plan = plan_sequence(keep, pad_right=pad_right)
    shorter = embeds.gather(1, plan.columns[..., None].expand(-1, -1, embeds.shape[-1]))
    return plan, shorter * plan.valid[..., None].to(shorter.dtype)


def _positions(
    position_ids: Tensor | None,
    plan: SequencePlan | None,
    past: int,
    past_valid: Tensor,
    length: int,
    device: torch.device,
) -> Tensor:
    """Original positions: explicit even where the model would count them by itself."""
    if position_ids is None:
        position_ids = torch.arange(past, past + length, device=device)[None]
    if plan is None:
        return position_ids
    position_ids = gather_positions(position_ids, plan)
    if position_ids.ndim == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids.clone()
        position_ids[0] = text_row_positions(plan.valid, past_valid)
    return position_ids


def _common_reason(outcomes: Sequence[ItemOutcome]) -> str:
    """Why nothing was reduced, if nothing was."""
    if any(outcome.reduction is not None for outcome in outcomes):
        return ""
    reasons = (stage.reason for outcome in outcomes for stage in outcome.stages[-1:])
    return "; ".join(dict.fromkeys(reasons))


def _kv_bytes_per_token(decoder: Any) -> int:
    config = decoder.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameter = next(decoder.parameters())
    element = parameter.element_size() if parameter.is_floating_point() else 2
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * element
