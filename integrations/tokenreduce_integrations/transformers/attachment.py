"""Stages on a live transformers model: two hooks on the text decoder, three methods wrapped on the
instance that owns the visual features, and a ledger on the key-value cache.

Nothing is patched on a class, positions stay those of the full sequence, and when nothing is
reduced the decoder is called exactly as it would be without the attachment.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from tokenreduce.attachment import Attachment, ItemReduction
from tokenreduce.errors import (
    AttachmentError,
    MissingSignal,
    StageNotEngaged,
    UnsupportedModel,
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
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.ledger import Ledger, ones
from tokenreduce_integrations.transformers.probes import Probe
from tokenreduce_integrations.transformers.sequence import (
    ReducedItem,
    SequencePlan,
    gather_positions,
    plan_sequence,
    query_mask,
    restore_length,
    text_row_positions,
)

MODALITIES = ("image", "video")
Function = TypeVar("Function", bound=Callable[..., Any])


def _outside_compilation(function: Function) -> Function:
    """Keep a hook out of compiled graphs: traced, it would be recompiled for every new length."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


_ABSENT = object()
_SEQUENCE_ARGUMENTS = {"inputs_embeds", "input_ids", "attention_mask", "position_ids"}


@dataclass(frozen=True)
class _EncodedItem:
    """What is known of an encoded item: where its tokens lie, and its signals ``(N, ...)``."""

    layout: Layout
    signals: Mapping[str, Tensor]


@dataclass(frozen=True)
class _VisualItem:
    """One visual item of a batch of prompts."""

    prompt: int
    modality: str
    columns: Tensor
    layout: Layout


@dataclass(frozen=True)
class _Choice:
    """What the stages made of the visual items of a batch of prompts.

    ``rows`` and ``columns`` say where all items' tokens lie, end to end.
    """

    items: list[_VisualItem]
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


class TransformersAttachment(Attachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    While attached, ``hidden_states`` and ``attentions`` that the model returns are those of the
    shorter sequence; ``logits`` and the loss have the shape of the given one. A cache made while
    attached must be continued while attached.
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
        self.owner = owner
        self._needs = tuple(dict.fromkeys(name for s in stages for name in s.reducer.needs))
        self._probe: Probe | None = None
        self._encoded_as = WeakTensorKeyDictionary()
        self._latest_layouts: dict[tuple[str, int], Layout] = {}
        self._encoded: dict[str, list[_EncodedItem]] = {}
        self._masks: dict[str, Tensor] = {}
        self._expects_visual = False
        self._watching = False
        self._call: _Call | None = None
        self._make_receipt: Callable[[], Receipt] | None = None
        self._wrapped: dict[str, tuple[object, object]] = {}
        self._handles: list[RemovableHandle] = []
        self._attach()

    # -- attaching and detaching -------------------------------------------------------------

    def _attach(self) -> None:
        if self._needs and self.family.probe is not None:
            self._probe = self.family.probe(self.owner, self._needs)
        self._wrap("get_placeholder_mask", self._watch_placeholders)
        for modality in MODALITIES:
            if hasattr(self.owner, f"get_{modality}_features"):
                watch = functools.partial(self._watch_features, modality)
                self._wrap(f"get_{modality}_features", watch)
        self._handles = [
            self.owner.register_forward_pre_hook(self._before_owner, with_kwargs=True),
            self.owner.register_forward_hook(self._after_owner),
            self.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True),
            self.decoder.register_forward_hook(self._after_decoder, always_call=True),
        ]

    def _wrap(self, name: str, watch: Callable[..., None]) -> None:
        original = getattr(self.owner, name)
        signature = inspect.signature(original)

        # generate() chooses the arguments of an encoding call by the signature, so it is kept.
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._watching:
                # Some models encode video by way of their own image method.
                return original(*args, **kwargs)
            self._watching = True
            try:
                result = original(*args, **kwargs)
            finally:
                self._watching = False
            watch(result, signature.bind(*args, **kwargs).arguments)
            return result

        self._wrapped[name] = (vars(self.owner).get(name, _ABSENT), wrapped)
        setattr(self.owner, name, wrapped)

    def detach(self) -> None:
        """See :meth:`tokenreduce.attachment.Attachment.detach`; detaching twice does nothing.

        Raises:
            AttachmentError: if another library wrapped the same methods since and its wrapper is
                still in place; the hooks are removed all the same.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._probe is not None:
            self._probe.detach()
        buried = []
        for name, (before, wrapped) in self._wrapped.items():
            if vars(self.owner).get(name) is not wrapped:
                buried.append(name)
            elif before is _ABSENT:
                delattr(self.owner, name)
            else:
                setattr(self.owner, name, before)
        self._wrapped = {}
        if buried:
            raise AttachmentError(
                f"cannot restore {', '.join(buried)} of {type(self.owner).__name__}: something "
                "else replaced it after the pipeline was attached. Undo that first; detach in the "
                "reverse order of attaching."
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AttachmentError(
            "a model cannot be copied or pickled while a pipeline is attached: the copy's hooks "
            "would act on the original. Detach, copy, and attach to each."
        )

    @property
    def receipt(self) -> Receipt:
        if self._make_receipt is not None:
            self._receipt, self._make_receipt = self._make_receipt(), None
        return super().receipt

    # -- what the model tells while it runs ---------------------------------------------------

    def _watch_features(self, modality: str, output: Any, arguments: Mapping[str, Any]) -> None:
        """Remember where the tokens of each encoded item lie."""
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise UnsupportedModel(
                f"get_{modality}_features of {type(self.owner).__name__} gives no pooler_output: "
                "this family needs an adapter of its own."
            )
        features = list(pooled)
        find = self.family.layouts.get(modality)
        layouts = (
            find(self.owner, features, arguments)
            if find is not None
            else [Layout.line(feature.shape[0]) for feature in features]
        )
        signals: list[dict[str, Tensor]] = [{} for _ in features]
        if self._probe is not None:
            signals = self._probe.read(modality, features)
        items = [_EncodedItem(*item) for item in zip(layouts, signals, strict=True)]
        for feature, item in zip(features, items, strict=True):
            self._encoded_as[feature] = item
            self._latest_layouts[modality, len(item.layout)] = item.layout
        self._encoded[modality] = items

    def _encoded_earlier(self, modality: str, features: Sequence[Tensor]) -> list[_EncodedItem]:
        """What is known of features that were encoded before, perhaps repeated since for beams."""
        items = []
        for feature in features:
            item = self._encoded_as.get(feature)
            if item is None:
                length = feature.shape[0]
                layout = self._latest_layouts.get((modality, length))
                item = _EncodedItem(Layout.line(length) if layout is None else layout, {})
            items.append(item)
        return items

    def _watch_placeholders(self, output: Any, arguments: Mapping[str, Any]) -> None:
        """Remember which columns hold visual features, for the modalities that have features."""
        masks = output if isinstance(output, tuple) else (output,)
        with_features = [
            modality for modality in MODALITIES if arguments.get(f"{modality}_features") is not None
        ]
        for modality in with_features:
            mask = masks[MODALITIES.index(modality)] if len(masks) > 1 else masks[0]
            self._masks[modality] = mask[..., 0] if mask.ndim == 3 else mask

    @_outside_compilation
    def _before_owner(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._masks, self._encoded = {}, {}
        encoded = kwargs.get("mm_encoder_outputs") or {}
        for modality in MODALITIES:
            pooled = getattr(encoded.get(modality), "pooler_output", None)
            if pooled is not None:
                self._encoded[modality] = self._encoded_earlier(modality, list(pooled))
        pixels = (
            kwargs.get(name)
            for name in ("pixel_values", "pixel_values_images", "pixel_values_videos")
        )
        self._expects_visual = bool(self._encoded) or any(value is not None for value in pixels)

    @_outside_compilation
    def _after_owner(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._expects_visual:
            self._expects_visual = False
            raise StageNotEngaged(
                f"visual features went into {type(self.owner).__name__}, but the attached stages "
                "never saw them: get_placeholder_mask was replaced after attaching, or this model "
                "merges its features in another way. Detach, undo the replacement, attach again."
            )

    # -- the decoder ---------------------------------------------------------------------------

    @_outside_compilation
    def _before_decoder(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._call = None
        masks, self._masks = self._masks, {}
        cache, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        ledger = Ledger.of(cache)
        if not masks and ledger is None:
            self._note_text_only(cache, embeds)
            return None
        if embeds is None:
            raise UnsupportedModel(
                f"{type(self.decoder).__name__} was called without inputs_embeds: the "
                f"{self.family.name} adapter does not serve it."
            )
        choice = None
        if masks:
            self._expects_visual = False
            choice = self._choose(masks, embeds)
        if choice is None and ledger is None:
            return None
        return args, self._shortened(choice, embeds, cache, ledger, kwargs)

    def _choose(self, masks: Mapping[str, Tensor], embeds: Tensor) -> _Choice | None:
        """Choose and merge visual tokens; None if all stay, which reads no tensor of the model."""
        encoded = [item for modality in masks for item in self._encoded_items(modality)]
        layouts = [item.layout for item in encoded]
        per_prompt = any(stage.total is not None for stage in self.stages)
        prompts = [item.prompt for item in self._items(masks)] if per_prompt else [0] * len(layouts)
        if self.enabled:
            outcomes = keep_all_outcomes(self.stages, layouts, prompts)
        else:
            outcomes = unchanged_outcomes(self.stages, layouts, "the attachment is disabled")
        if outcomes is not None:
            self._note_unchanged(masks, outcomes, embeds.shape[1])
            return None
        items = self._items(masks)
        rows = torch.cat([torch.full_like(item.columns, item.prompt) for item in items])
        columns = torch.cat([item.columns for item in items])
        stopwatch = Stopwatch()
        with stopwatch.running(embeds.device):
            packed = PackedTokens(
                features=embeds[rows, columns],
                layouts=tuple(layouts),
                signals=self._packed_signals(encoded),
            )
            outcomes = run_stages(self.stages, packed, [item.prompt for item in items])
        if all(outcome.reduction is None for outcome in outcomes):
            self._note_unchanged(masks, outcomes, embeds.shape[1])
            return None
        return _Choice(items, outcomes, rows, columns, stopwatch)

    def _shortened(
        self,
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
            past_valid, past = ones(batch, held, embeds.device), held
        tokens = query_mask(mask, past, batch, length)
        full = tokens is None and (ledger is None or ledger.full)
        if tokens is None:
            tokens = ones(batch, length, embeds.device)

        shorter = dict(kwargs)
        plan = None
        if choice is not None:
            with choice.stopwatch.running(embeds.device):
                plan, shorter["inputs_embeds"] = _gather_outputs(embeds, tokens, choice)
            further = self._further_arguments(kwargs, plan, choice)
            self._check_arguments(kwargs, further, cache, batch, length)
            shorter.update(further)
            full = bool(plan.valid.all()) and bool(past_valid.all())
            self._note_choice(choice, length, plan.columns.shape[1])
        shorter["position_ids"] = self._positions(
            kwargs.get("position_ids"), plan, past, past_valid, length, embeds.device
        )
        valid = torch.cat([past_valid, tokens if plan is None else plan.valid], dim=1)
        # Without a cache, a missing mask and gaps in the positions would be taken for packed
        # samples; with one, a missing mask is safe and spares the decoder a mask.
        safe = cache is not None and not cache.is_compileable
        shorter["attention_mask"] = None if safe and full else valid.long()
        self._call = _Call(plan, length, ledger, Ledger(valid, past + length, full=full))
        if ledger is not None:
            ledger.inside_decoder = True
        return shorter

    def _packed_signals(self, encoded: Sequence[_EncodedItem]) -> dict[str, Tensor]:
        for name in self._needs:
            if any(name not in item.signals for item in encoded):
                raise MissingSignal(
                    f"signal {name!r} of visual features that were not encoded while the pipeline "
                    "was attached. Encode them after attaching, or use a strategy that reads "
                    "projected features only."
                )
        return {name: torch.cat([item.signals[name] for item in encoded]) for name in self._needs}

    def _encoded_items(self, modality: str) -> list[_EncodedItem]:
        if modality not in self._encoded:
            raise AttachmentError(
                f"{modality} features reached {type(self.owner).__name__} that neither its "
                f"get_{modality}_features nor mm_encoder_outputs gave: pass them through one of "
                "the two."
            )
        return self._encoded[modality]

    def _items(
        self,
        masks: Mapping[str, Tensor],
        known: Mapping[str, list[_EncodedItem]] | None = None,
    ) -> list[_VisualItem]:
        """The visual items of the batch: each modality in reading order.

        Raises:
            AttachmentError: if the placeholders do not hold whole items.
        """
        items = []
        for modality, mask in masks.items():
            encoded = known[modality] if known is not None else self._encoded_items(modality)
            layouts = [item.layout for item in encoded]
            places = mask.nonzero()
            if places.shape[0] != sum(len(layout) for layout in layouts):
                raise AttachmentError(
                    f"{places.shape[0]} {modality} placeholders, but items of "
                    f"{[len(layout) for layout in layouts]} tokens: the prompt was split inside "
                    "an item (chunked prefill). Prefill in one call while a pipeline is attached."
                )
            start = 0
            rows = places[:, 0].tolist()
            for layout in layouts:
                stop = start + len(layout)
                if len(layout) and rows[start] != rows[stop - 1]:
                    raise AttachmentError(
                        f"a {modality} of {len(layout)} tokens lies across prompts "
                        f"{rows[start]} and {rows[stop - 1]}: placeholders and features disagree."
                    )
                items.append(_VisualItem(rows[start], modality, places[start:stop, 1], layout))
                start = stop
        return items

    def _positions(
        self,
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

    def _further_arguments(
        self, kwargs: Mapping[str, Any], plan: SequencePlan, choice: _Choice
    ) -> dict[str, Any]:
        if self.family.shorten is None:
            return {}
        items = [
            ReducedItem(item.prompt, item.columns, outcome.reduction)
            for item, outcome in zip(choice.items, choice.outcomes, strict=True)
        ]
        return self.family.shorten(kwargs, plan, items)

    def _check_arguments(
        self,
        kwargs: Mapping[str, Any],
        shortened: Mapping[str, Any],
        cache: Any,
        batch: int,
        length: int,
    ) -> None:
        """Refuse what would be shorter than the sequence says, rather than compute nonsense."""
        for name, value in kwargs.items():
            if name in _SEQUENCE_ARGUMENTS or name in shortened or not isinstance(value, Tensor):
                continue
            if value.ndim >= 2 and tuple(value.shape[:2]) == (batch, length):
                raise UnsupportedModel(
                    f"{type(self.decoder).__name__} also reads {name!r}, one entry for each token: "
                    f"the {self.family.name} adapter cannot shorten it."
                )
        mask = kwargs.get("attention_mask")
        built = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
        if built and not (cache is not None and cache.is_compileable):
            raise UnsupportedModel(
                f"{type(self.owner).__name__} builds its own attention mask before the decoder: "
                f"the {self.family.name} adapter cannot shorten it."
            )

    @_outside_compilation
    def _after_decoder(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._call = self._call, None
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

    def _note(self, make: Callable[[], Receipt]) -> None:
        self._receipt, self._make_receipt = None, make
        if installed().observers:
            notify_observers(self.receipt)

    def _note_text_only(self, cache: Any, embeds: Tensor | None) -> None:
        if Ledger.held(cache) == 0 and embeds is not None:
            length = embeds.shape[1]
            self._reductions = ()
            self._note(
                lambda: self._receipt_of(
                    [], [], length, length, Stopwatch(), reason="a text-only turn"
                )
            )

    def _note_unchanged(
        self, masks: Mapping[str, Tensor], outcomes: list[ItemOutcome], length: int
    ) -> None:
        def make() -> Receipt:
            items = self._items(masks, encoded)
            self._reductions = _reductions(items, outcomes)
            return self._receipt_of(items, outcomes, length, length, Stopwatch())

        encoded = {modality: self._encoded_items(modality) for modality in masks}
        self._note(make)

    def _note_choice(self, choice: _Choice, sequence_in: int, sequence_out: int) -> None:
        self._reductions = _reductions(choice.items, choice.outcomes)
        self._note(
            lambda: self._receipt_of(
                choice.items, choice.outcomes, sequence_in, sequence_out, choice.stopwatch
            )
        )

    def _receipt_of(
        self,
        items: Sequence[_VisualItem],
        outcomes: Sequence[ItemOutcome],
        sequence_in: int,
        sequence_out: int,
        stopwatch: Stopwatch,
        *,
        reason: str = "",
    ) -> Receipt:
        reasons = [outcome.stages[-1].reason for outcome in outcomes if outcome.reduction is None]
        if outcomes and len(reasons) == len(outcomes):
            reason = "; ".join(dict.fromkeys(reasons))
        config = self.decoder.config
        return Receipt(
            items=tuple(
                ItemReceipt(prompt=item.prompt, modality=item.modality, stages=outcome.stages)
                for item, outcome in zip(items, outcomes, strict=True)
            ),
            sequence_in=sequence_in,
            sequence_out=sequence_out,
            layers=config.num_hidden_layers,
            kv_bytes_per_token=_kv_bytes_per_token(self.decoder),
            stopwatch=stopwatch,
            reason=reason,
        )


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
    for item, outcome in zip(choice.items, choice.outcomes, strict=True):
        reduction = outcome.reduction
        kept = item.columns if reduction is None else item.columns[reduction.positions[0]]
        owner = torch.full_like(kept, item.prompt)
        rows.append(owner)
        columns.append(kept)
        if reduction is not None and reduction.weights is not None:
            merged.append((owner, kept, reduction.features[0]))
    keep = tokens.clone()
    keep[choice.rows, choice.columns] = False
    keep[torch.cat(rows), torch.cat(columns)] = True
    if merged:
        place_rows, place_columns, features = (
            torch.cat(parts) for parts in zip(*merged, strict=True)
        )
        embeds = embeds.index_put((place_rows, place_columns), features.to(embeds.dtype))
    pad_right = not bool(tokens[:, -1].all()) and bool(tokens[:, 0].all())
    plan = plan_sequence(keep, pad_right=pad_right)
    shorter = embeds.gather(1, plan.columns[..., None].expand(-1, -1, embeds.shape[-1]))
    return plan, shorter * plan.valid[..., None].to(shorter.dtype)


def _reductions(
    items: Sequence[_VisualItem], outcomes: Sequence[ItemOutcome]
) -> tuple[ItemReduction, ...]:
    return tuple(
        ItemReduction(
            prompt=item.prompt,
            modality=item.modality,
            columns=item.columns,
            layout=item.layout,
            reduction=outcome.reduction,
        )
        for item, outcome in zip(items, outcomes, strict=True)
    )


def _kv_bytes_per_token(decoder: Any) -> int:
    config = decoder.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameter = next(decoder.parameters())
    element = parameter.element_size() if parameter.is_floating_point() else 2
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * element
