"""Stages on models whose visual tokens go into the encoder of an encoder-decoder (T5, BART).

The encoder runs over the shorter sequence at its original positions, and the decoder attends to
what it gives. What the encoder gives for padding is zero, which tells the decoder's hook the mask
without any state: beams, interleaved generations and threads need nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenreduce.errors import UnsupportedModel
from tokenreduce_integrations.transformers.attachment import Choice, TransformersAttachment
from tokenreduce_integrations.transformers.hooks import (
    Replacement,
    outside_compilation,
    replace_method,
    restore_methods,
)
from tokenreduce_integrations.transformers.ledger import Given, Slots
from tokenreduce_integrations.transformers.sequence import SequencePlan, gather_outputs


class EncoderAttachment(TransformersAttachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    While attached, ``encoder_last_hidden_state`` is that of the shorter sequence.
    """

    def __init__(self, *args: Any, text_decoder: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handles.append(
            text_decoder.register_forward_pre_hook(self._before_text, with_kwargs=True)
        )
        self._biased = keep_positions(self.decoder, self._plan_under_way, self._handles)

    def detach(self) -> None:
        """See :meth:`tokenreduce.attachment.Attachment.detach`; detaching twice does nothing."""
        biased, self._biased = self._biased, []
        try:
            restore_methods(biased)
        finally:
            super().detach()

    def _plan_under_way(self) -> tuple[SequencePlan, int] | None:
        call = self._under_way.call
        if call is None or call.plan is None:
            return None
        return call.plan, call.given.slots.valid.shape[1]

    def _shortened(
        self,
        choice: Choice | None,
        given: Given,
        kwargs: Mapping[str, Any],
    ) -> tuple[dict[str, Any], SequencePlan | None, Slots]:
        if choice is None:
            return dict(kwargs), None, given.slots
        embeds = kwargs["inputs_embeds"]
        with choice.stopwatch.running(embeds.device):
            plan, shorter = gather_outputs(embeds, given.slots.valid, choice.items)
        self._record(choice, choice.outcomes, embeds.shape[1], plan.columns.shape[1])
        mask = plan.valid.long()
        entered = Slots.entered(plan.valid, full=False)
        return {**kwargs, "inputs_embeds": shorter, "attention_mask": mask}, plan, entered

    @outside_compilation
    def _after_decoder(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call, self._under_way.call = self._under_way.call, None
        if call is None or call.plan is None or output is None:
            return None
        valid = call.plan.valid[..., None]
        output.last_hidden_state = output.last_hidden_state.masked_fill(~valid, 0)
        return output

    @outside_compilation
    def _before_text(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if states is None or (mask is not None and mask.shape[-1] == states.shape[1]):
            return None
        valid = (states != 0).any(-1)
        if mask is None and bool(valid.all()):
            return None
        return args, {**kwargs, "encoder_attention_mask": valid.long()}


def find_encoder(model: nn.Module) -> tuple[Any, Any]:
    """The text encoder and the text decoder of an encoder-decoder model.

    Raises:
        UnsupportedModel: if there are none.
    """
    outer: Any = getattr(model, "model", model)
    inner = getattr(outer, "language_model", None)
    inner = getattr(inner, "model", inner)
    encoder, decoder = getattr(inner, "encoder", None), getattr(inner, "decoder", None)
    if encoder is None or decoder is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no text encoder and decoder where TokenReduce looks for "
            "them: in its language_model."
        )
    return encoder, decoder


def keep_positions(
    encoder: Any,
    plan: Callable[[], tuple[SequencePlan, int] | None],
    handles: list[RemovableHandle],
) -> list[Replacement]:
    """Give the encoder's tokens the positions that they have in the full sequence.

    Args:
        encoder: with absolute positions in ``embed_positions`` (BART), or relative ones in the
            ``compute_bias`` of its attention (T5).
        plan: the shorter sequence of the call under way and the length of the full one.
        handles: where the hooks are noted.

    Returns:
        each ``compute_bias`` that was replaced.
    """
    table = getattr(encoder, "embed_positions", None)
    if table is not None:

        def embedded(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            current = plan()
            if current is None:
                return None
            columns = current[0].columns + module.offset
            return nn.functional.embedding(columns, module.weight)

        handles.append(table.register_forward_hook(outside_compilation(embedded)))
    biased = [m for m in encoder.modules() if getattr(m, "has_relative_attention_bias", False)]
    return [
        replace_method(attention, "compute_bias", _gathered_bias(attention.compute_bias, plan))
        for attention in biased
    ]


def _gathered_bias(
    original: Callable[..., Tensor], plan: Callable[[], tuple[SequencePlan, int] | None]
) -> Callable[..., Tensor]:
    def compute_bias(query_length: int, key_length: int, *args: Any, **kwargs: Any) -> Tensor:
        current = plan()
        if current is None:
            return original(query_length, key_length, *args, **kwargs)
        sequence, length = current
        bias = original(length, length, *args, **kwargs)[0]
        columns = sequence.columns.to(bias.device)
        return torch.stack([bias[:, row][:, :, row] for row in columns])

    return compute_bias
