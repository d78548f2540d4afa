"""Stages on models that answer by denoising (DiffusionGemma).

An encoder reads the prompt into a key-value cache, and a decoder reads that cache at every
denoising step of a block of the answer (the canvas), without adding to it. When a block is done,
the encoder reads it too. So reducing the prompt means shortening what the encoder computes, as in
any LLM, and showing the decoder the cache as it is, with positions of the full sequence.

A schedule keeps the full sequence and a reduced one: a second cache goes along with the caller's,
the encoder reads everything into both, and the step decides which of them the decoder sees. The
state lies on the caller's cache, so interleaved generations and loops of one's own count their own
steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import AttachmentError, UnsupportedGeneration
from tokenreduce.receipt import Receipt, StepRange
from tokenreduce_integrations.transformers.attachment import TransformersAttachment
from tokenreduce_integrations.transformers.generation import refuse_generation
from tokenreduce_integrations.transformers.hooks import outside_compilation
from tokenreduce_integrations.transformers.ledger import Ledger
from tokenreduce_integrations.transformers.watch import VisualInput

_TWIN = "_tokenreduce_twin"


@dataclass
class Passes:
    """How often the decoder has read the full sequence, and the reduced one."""

    full: int = 0
    reduced: int = 0


@dataclass
class Twin:
    """A cache with the reduced sequence, that goes along with one with the full sequence.

    Attributes:
        cache: what holds the reduced sequence.
        from_step: how many steps of a block read the full one.
        step: the step of the block under way that comes next.
        passes: what was read so far.
    """

    cache: Any
    from_step: int
    step: int = 0
    passes: Passes = field(default_factory=Passes)

    @staticmethod
    def of(cache: Any) -> Twin | None:
        """The twin of a cache; None for no cache, an empty one, or one without.

        Raises:
            AttachmentError: if the cache has been changed without its twin.
        """
        twin: Twin | None = getattr(cache, _TWIN, None)
        if twin is None or Ledger.held(cache) == 0:
            return None
        if int(cache.get_seq_length()) != int(twin.cache.get_seq_length()):
            raise AttachmentError(
                "a cache that a pipeline with denoising-schedule filled was cropped, or continued "
                "without that pipeline, or its last call was interrupted: its full and its reduced "
                "sequence do not agree any more. Start with a new cache."
            )
        return twin

    def sees_reduced(self) -> bool:
        """Whether the coming step reads the reduced sequence; counts it."""
        late = self.step >= self.from_step
        self.step += 1
        if late:
            self.passes.reduced += 1
        else:
            self.passes.full += 1
        return late


def refuse_denoising(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse generations that hooks cannot follow; see :func:`refuse_generation`."""
    refuse_generation(model, arguments)
    config = arguments.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        return arguments.get(name, getattr(config, name, None))

    cache = arguments.get("past_key_values")
    static = "static" in (option("cache_implementation") or "")
    if (static or getattr(cache, "is_compileable", False)) and not option("disable_compile"):
        raise UnsupportedGeneration(
            f"a static cache: {type(model).__name__} would compile its denoising steps as one "
            "graph, which hooks cannot interrupt. Pass disable_compile=True, or leave "
            "cache_implementation out."
        )


class DiffusionAttachment(TransformersAttachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    ``decoder`` is the encoder's language model, which fills the cache. A cache made while attached
    must be continued while attached; one with a schedule holds the full sequence, and is continued
    as any other when it is detached.
    """

    _refuse_generation = staticmethod(refuse_denoising)

    def __init__(self, *args: Any, canvas: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._passes: Passes | None = None
        self._handles.append(
            canvas.register_forward_pre_hook(self._before_canvas, with_kwargs=True)
        )

    @property
    def receipt(self) -> Receipt:
        """The record of the latest prefill, and of the denoising steps since."""
        receipt, passes = super().receipt, self._passes
        if passes is None or receipt.reason:
            return receipt
        first = receipt.items[0].stages[0].from_step
        return replace(
            receipt,
            steps=(
                StepRange(first=0, passes=passes.full, tokens=receipt.tokens_in),
                StepRange(first=first, passes=passes.reduced, tokens=receipt.tokens_out),
            ),
        )

    def _begin(
        self, visual: VisualInput | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache, from_step = kwargs.get("past_key_values"), self.stages[0].reducer.from_step
        twin = Twin.of(cache)
        if twin is None and (visual is None or not from_step):
            self._passes = None
            return super()._begin(visual, args, kwargs)
        alien = Ledger.of(cache) is not None if twin is None else twin.from_step != from_step
        if alien:
            raise AttachmentError(
                "this cache was filled by another pipeline, which reduced at other denoising "
                "steps: continue it with that pipeline attached, or start with a new cache."
            )
        if cache is None:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.decoder.config)
        if twin is None:
            twin = Twin(copy.deepcopy(cache), from_step)
        twin.step, self._passes = 0, twin.passes
        begun = super()._begin(visual, args, {**kwargs, "past_key_values": twin.cache})
        if begun is None:
            return None
        args, shorter = begun
        # Not through the hooks, which are under way for the full sequence.
        output = self.decoder.forward(*args, **shorter)
        super()._after_decoder(self.decoder, args, output)
        setattr(cache, _TWIN, twin)
        return args, {**kwargs, "past_key_values": cache}

    @outside_compilation
    def _before_canvas(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache: Any = kwargs.get("past_key_values")
        twin = Twin.of(cache)
        if twin is not None:
            if not twin.sees_reduced():
                return None
            cache = twin.cache
        ledger = Ledger.of(cache)
        if ledger is None:
            return None
        canvas: Tensor = kwargs["decoder_input_ids"]
        past, positions = int(cache.get_seq_length()), kwargs.get("decoder_position_ids")
        if positions is None:
            positions = torch.arange(past, past + canvas.shape[1], device=canvas.device)[None]
        seen = {
            "past_key_values": Ledger.view(cache),
            "decoder_position_ids": positions,
            "decoder_attention_mask": _canvas_mask(decoder, kwargs, cache, ledger),
        }
        return args, {**kwargs, **seen}


def _canvas_mask(decoder: Any, kwargs: Mapping[str, Any], cache: Any, ledger: Ledger) -> Any:
    """The decoder's mask over the slots that a cache really holds, and the canvas."""
    given, canvas = kwargs.get("decoder_attention_mask"), kwargs["decoder_input_ids"]
    if isinstance(given, Mapping):
        given = given["full_attention"]
    if given is None and ledger.full and not cache.is_compileable:
        return None
    batch, length = canvas.shape
    held, past = ledger.aligned(Ledger.held(cache), batch)
    own = held.new_ones(batch, length)
    if given is not None:
        row = given[:, 0, 0] if given.ndim == 4 else given
        row = row[:, past : past + length]
        own = (row == 0 if row.is_floating_point() else row.bool()).expand(batch, -1)
    return decoder.create_diffusion_decoder_attention_mask(
        config=decoder.config,
        inputs_embeds=decoder.embed_tokens.weight.new_empty(batch, length, 0),
        past_key_values=Ledger.view(cache),
        decoder_attention_mask=torch.cat([held, own.to(held.device)], dim=1),
    )
