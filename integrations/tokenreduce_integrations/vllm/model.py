"""What TokenReduce adds to vLLM's model classes: items are reduced as soon as they are encoded.

Classes are made when they are asked for: ``TokenReduceLlavaForConditionalGeneration`` is vLLM's
``LlavaForConditionalGeneration`` with reduction before it. No class of vLLM is changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from tokenreduce_integrations.vllm import mrope
from tokenreduce_integrations.vllm.families import FAMILIES, Family
from tokenreduce_integrations.vllm.items import FIELD, ServedItem
from tokenreduce_integrations.vllm.processing import reducing_processor, unpruned
from tokenreduce_integrations.vllm.reducing import Kept, reduce_items
from tokenreduce_integrations.vllm.signals import TowerSignals


class Reducing:
    """Goes before the in-tree class of a model."""

    family: ClassVar[Family]
    config: Any
    #: A tower adapter would be laid out by the number of tokens that stay.
    supports_tower_connector_lora: ClassVar[bool] = False

    @cached_property
    def _signals(self) -> TowerSignals:
        return TowerSignals(self, self.family)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See vLLM; reads what transformers 5 wrote as well."""
        named = ((self.family.weight_name(name), weight) for name, weight in weights)
        loaded: set[str] = super().load_weights(named)  # type: ignore[misc]
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode and reduce the items of a batch, all of one modality."""
        data = kwargs.pop(FIELD, None)
        if not kwargs:
            return super().embed_multimodal()  # type: ignore[misc]
        items = ServedItem.from_batch(data)
        wanted = {name for item in items for name in item.needs}
        with self._signals.catching(wanted, kwargs):
            encoded = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        features = [each.reshape(-1, each.shape[-1]) for each in encoded]
        # Strategies ask the device for answers, which vLLM may be told to report.
        with gpu_sync_allowed():
            signals = self._signals.read(items, kwargs)
            if "prompt_embeddings" in wanted:
                signals["prompt_embeddings"] = [self._query_embeddings(item) for item in items]
            width = self.config.get_text_config().hidden_size
            wider = bool(features) and features[0].shape[-1] > width
            kept = reduce_items(features, items, signals, channels=width if wider else None)
            return tuple(
                self._rows(each, item, kwargs, index)
                for index, (each, item) in enumerate(zip(kept, items, strict=True))
            )

    def _query_embeddings(self, item: ServedItem) -> Tensor:
        """``(P, D)`` text embeddings of an item's query, as the LLM reads text."""
        return self._text_embeddings(() if item.stage is None else item.stage.query_ids)

    def _text_embeddings(self, ids: Sequence[int]) -> Tensor:
        """``(P, D)`` what the LLM reads of text."""
        parameter = next(self.parameters())  # type: ignore[attr-defined]
        tokens = torch.tensor(ids, dtype=torch.long, device=parameter.device)
        language_model = self.get_language_model()  # type: ignore[attr-defined]
        embeddings: Tensor = language_model.embed_input_ids(tokens)
        return embeddings

    def _rows(self, kept: Kept, item: ServedItem, kwargs: Mapping[str, Any], index: int) -> Tensor:
        """``(M, ...)`` what of an item goes to the LLM."""
        return kept.features


class ReducingMRope(Reducing):
    """Goes before the in-tree class of a model with M-RoPE; see :mod:`.mrope`."""

    supports_multimodal_pruning: ClassVar[bool] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ("evs",)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # vLLM's own pruning stays off: what the runner is told enables ours.
        self.is_multimodal_pruning_enabled = False
        self._waiting = WeakTensorKeyDictionary()

    def _rows(self, kept: Kept, item: ServedItem, kwargs: Mapping[str, Any], index: int) -> Tensor:
        relative = self._relative_positions(item, kwargs, index).to(kept.features.device)
        extent = int(relative.max()) + 1
        rows, columns = kept
        if item.sequence:
            rows, columns = self._with_text(kept, item)
        return mrope.with_positions(rows, relative[columns], extent)

    def _with_text(self, kept: Kept, item: ServedItem) -> Kept:
        """Features with the text between them, standing in the item with its text."""
        device = kept.features.device
        is_text = torch.tensor(item.ids(-1), device=device) >= 0
        text = self._text_embeddings(item.text).to(kept.features)
        # Text has nothing for the layers that visual tokens enter later.
        text = torch.nn.functional.pad(text, (0, kept.features.shape[1] - text.shape[1]))
        visual = (~is_text).nonzero()[:, 0][kept.positions]
        columns = torch.cat([visual, is_text.nonzero()[:, 0]])
        order = columns.argsort()
        return Kept(torch.cat([kept.features, text])[order], columns[order])

    def _relative_positions(
        self, item: ServedItem, kwargs: Mapping[str, Any], index: int
    ) -> Tensor:
        """``(L, 3)`` positions of an item, with its text, that begins a prompt."""
        modality = "image" if "image_grid_thw" in kwargs else "video"
        names = (f"{modality}_grid_thw", "second_per_grid_ts")
        fields = {
            name: MultiModalFieldElem(
                data=kwargs[name][index].cpu(), field=MultiModalFieldConfig.batched(modality).field
            )
            for name in names
            if kwargs.get(name) is not None
        }
        ids = item.ids(getattr(self.config, f"{modality}_token_id"))
        feature = MultiModalFeatureSpec(
            data=MultiModalKwargsItem(fields),
            modality=modality,
            identifier="",
            mm_position=PlaceholderRange(offset=0, length=len(ids)),
        )
        positions, _ = super().get_mrope_input_positions(ids, [feature])  # type: ignore[misc]
        relative: Tensor = positions.T
        return relative

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """``(3, S)`` positions of a prompt before its items are encoded, and what is to be added
        to the number of a token behind it."""
        features = sorted(mm_features, key=lambda each: each.mm_position.offset)
        runs = [
            ServedItem.from_tensor(each.data[FIELD].data).ids(input_tokens[each.mm_position.offset])
            for each in features
        ]
        spans = [
            mrope.Span(offset=each.mm_position.offset, kept=each.mm_position.length, full=len(run))
            for each, run in zip(features, runs, strict=True)
        ]
        starts = mrope.written_out(spans)
        whole, end = [], 0
        for span, run in zip(spans, runs, strict=True):
            whole += input_tokens[end : span.offset]
            whole += run
            end = span.offset + span.kept
        whole += input_tokens[end:]
        placed = [
            replace(each, mm_position=PlaceholderRange(offset=start, length=span.full))
            for each, span, start in zip(features, spans, starts, strict=True)
        ]
        positions, delta = super().get_mrope_input_positions(whole, placed)  # type: ignore[misc]
        waiting = mrope.waiting_positions(positions, spans, len(input_tokens))
        delta = int(delta) + len(whole) - len(input_tokens)
        self._waiting[waiting] = (waiting.clone(), delta)
        return waiting, delta

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """Features without their positions, the prompt's positions, and what is to be added to the
        number of a token behind it.

        The runner keeps the positions that :meth:`get_mrope_input_positions` gave and calls this
        in each step, also again for what it forgot; or it keeps a copy, and calls this once for
        each row.
        """
        length = mrope_positions.shape[1]
        known = self._waiting.get(mrope_positions)
        waiting, delta = known if known is not None else (mrope_positions, None)
        positions, features = mrope_positions, []
        with gpu_sync_allowed():
            if len(multimodal_embeddings):
                parts = [mrope.without_positions(rows) for rows in multimodal_embeddings]
                features = [part for part, _ in parts]
                values = torch.cat([value for _, value in parts]).to(mrope_positions.device)
                ids = torch.as_tensor(input_ids, device=mrope_positions.device)
                visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
                columns = (
                    visual[num_computed_tokens:].nonzero()[: len(values), 0] + num_computed_tokens
                )
                positions = mrope.settled_positions(positions, waiting, columns, values[:, :3])
                if delta is None and int(columns[-1]) == length - 1:
                    delta = int(waiting[0, -1] + values[-1, 3]) - length
            if delta is None:
                delta = int(waiting[:, -1].max()) + 1 - length
        return features, positions, delta


def _served_class(family: Family) -> type:
    module = importlib.import_module(family.module)
    base: Any = getattr(module, family.class_name or family.architecture)
    mixin = ReducingMRope if family.mrope else Reducing
    served: Any = type(family.name, (mixin, base), {"__module__": __name__, "family": family})
    if hasattr(base, "get_encoder_cudagraph_config"):

        def without_graphs(self: Any) -> Any:
            # Graphs of the encoder would pass by embed_multimodal, and what is reduced there.
            return replace(super(served, self).get_encoder_cudagraph_config(), modalities=[])

        served.get_encoder_cudagraph_config = without_graphs
    parts = base._processor_factory

    def processor(info: Any, dummy_inputs: Any) -> Any:
        # The factory chooses a class by the configuration.
        chosen = type(parts.processor(info, dummy_inputs))
        return reducing_processor(chosen, family)(info, dummy_inputs)

    def info(context: Any) -> Any:
        return parts.info(unpruned(context) if family.mrope else context)

    registered: type = MULTIMODAL_REGISTRY.register_processor(
        processor, info=info, dummy_inputs=parts.dummy_inputs
    )(served)
    return registered


def __getattr__(name: str) -> type:
    """The class of an architecture, made when it is first asked for."""
    if name not in FAMILIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    served = globals()[name] = _served_class(FAMILIES[name])
    return served
