"""What TokenReduce adds to vLLM's multimodal processors: fewer placeholders, and why.

It runs in the API process, which has no model. It reads the settings of the server and of the
request, states how many tokens of each item will stay, and hands the worker settings and shape.
Settings that cannot be served raise here, before the engine sees the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Final

from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.processing.processor import PromptUpdateDetails

from tokenreduce.errors import ServingError
from tokenreduce_integrations.vllm.families import ENCODED, Family, Processed
from tokenreduce_integrations.vllm.items import FIELD, ServedItem
from tokenreduce_integrations.vllm.settings import KEY, ServedStage

#: In place of a request's settings: leave everything whole. Not to be had from outside.
_WHOLE: Final = object()


class ReducingProcessor:
    """Goes before the processor class of a model."""

    family: ClassVar[Family]
    info: Any

    @cached_property
    def _served(self) -> ServedStage:
        return ServedStage.from_config(getattr(self._config, KEY, None))

    @property
    def _config(self) -> Any:
        return self.info.ctx.model_config.hf_config

    def _stage(self, kwargs: Mapping[str, Any]) -> ServedStage | None:
        """How the items of a request are reduced; None if they stay whole.

        Raises:
            ServingError: if that cannot be served.
        """
        given = kwargs.get(KEY)
        if given is _WHOLE:
            return None
        stage = self._served.for_request(given)
        media = self.info.ctx.get_mm_config()
        self.family.require(
            stage, self._config, sharded_pictures=media.mm_encoder_tp_mode == "data"
        )
        if stage.needs_query:
            tokenizer = self.info.get_tokenizer()
            ids = tokenizer.encode(stage.query, add_special_tokens=False)
            stage = stage.with_query_ids(ids)
        return stage

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Whole items: a request may ask for that, and vLLM sizes its caches by these."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        inputs.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, KEY: _WHOLE}
        return inputs

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Items are cached, here and in the engine, by their content and how they are reduced."""
        stage = self._stage(inputs.hf_processor_mm_kwargs)
        others = replace(inputs, hf_processor_mm_kwargs=_others(inputs.hf_processor_mm_kwargs))
        hashes: Mapping[str, Sequence[str]] = super()._get_mm_hashes(others)  # type: ignore[misc]
        return {
            modality: [f"{each}-{KEY}-{_identity(stage, modality)}" for each in known]
            for modality, known in hashes.items()
        }

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        others = replace(inputs, hf_processor_mm_kwargs=_others(given))
        kwargs = super()._get_cache_missing_processor_kwargs(  # type: ignore[misc]
            others, mm_is_cached
        )
        return {**kwargs, KEY: given[KEY]} if KEY in given else kwargs

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(  # type: ignore[misc]
            mm_items, _others(hf_kwargs)
        )

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Any:
        return super()._get_mm_fields_config(  # type: ignore[misc]
            hf_inputs, _others(hf_processor_mm_kwargs)
        )

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Any:
        stage = self._stage(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            mm_items, _others(hf_processor_mm_kwargs), out_mm_kwargs
        )
        return {
            modality: [
                self._reduce(each, out_mm_kwargs[modality][index], stage)
                for index, each in enumerate(per_item)
            ]
            for modality, per_item in updates.items()
        }

    def _reduce(self, updates: Sequence[Any], fields: Any, stage: ServedStage | None) -> list[Any]:
        """The placeholders of an item, which is told the worker among its fields."""
        modality, content = updates[0].modality, updates[0].content
        processed = Processed(info=self.info, fields=fields, tokens=_embedded(content))
        if stage is not None and modality not in stage.modalities:
            stage = None
        brought = f"{modality}_embeds" in fields
        if stage is not None and brought and not ENCODED.isdisjoint(stage.needs):
            raise ServingError(
                f"strategy {stage.reducer().name!r} reads the vision tower, which embeddings that "
                "a request brings do not pass. Send the picture, or use a strategy that reads "
                "features only."
            )
        item = ServedItem(
            shape=self.family.shapes[modality](processed),
            stage=stage,
            sequence=_sequence(content) if modality in self.family.embeds_text else (),
        )
        fields[FIELD] = MultiModalFieldElem(
            data=item.to_tensor(), field=MultiModalBatchedField(keep_on_cpu=True)
        )
        return [replace(update, content=_shortened(update.content, item)) for update in updates]


def reducing_processor(processor: type, family: Family) -> type:
    """The processor class of a model, with reduction."""
    name = f"Reducing{processor.__name__}"
    return type(name, (ReducingProcessor, processor), {"family": family})


def unpruned(context: Any) -> Any:
    """A processor's context in which vLLM prunes no clips.

    The engine is configured to, so that it corrects positions; processors would make room for it.
    """
    config = copy(context.model_config)
    config.multimodal_config = copy(config.multimodal_config)
    config.multimodal_config.video_pruning_rate = None
    return replace(context, model_config=config)


def _others(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says to the processor of the model itself."""
    return {key: value for key, value in kwargs.items() if key != KEY}


def _identity(stage: ServedStage | None, modality: str) -> str:
    return stage.digest if stage is not None and modality in stage.modalities else "whole"


def _embedded(content: PromptUpdateDetails) -> int:
    """How many of an item's tokens are placeholders of visual ones."""
    if content.is_embed is None:
        return len(content.full)
    return int(content.is_embed(content.full).sum())


def _sequence(content: PromptUpdateDetails) -> tuple[int, ...]:
    """An item's text in its order, with ``-n`` for n placeholders."""
    runs: list[int] = []
    for token, visual in zip(content.full, content.is_embed(content.full).tolist(), strict=True):
        if not visual:
            runs.append(token)
        elif runs and runs[-1] < 0:
            runs[-1] -= 1
        else:
            runs.append(-1)
    return tuple(runs)


def _shortened(content: PromptUpdateDetails, item: ServedItem) -> PromptUpdateDetails:
    """The same with fewer placeholders of each part.

    Every other token stays, or is a placeholder as well where it is embedded with the item.
    """
    if content.is_embed is None:
        return replace(content, full=list(content.full[: item.kept]))
    if item.sequence:
        first = int(content.is_embed(content.full).nonzero()[0])
        placeholders = [content.full[first]] * (item.kept + len(item.text))
        return PromptUpdateDetails.from_seq(placeholders)
    stays = iter(
        [
            place < kept
            for part, kept in zip(item.shape.parts, item.kept_parts, strict=True)
            for place in range(len(part))
        ]
    )
    embedded = content.is_embed(content.full).tolist()
    full = [
        token for token, visual in zip(content.full, embedded, strict=True)
        if not visual or next(stays)
    ]  # fmt: skip
    return replace(content, full=full)
