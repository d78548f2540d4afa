"""Signals of the prompt that a visual item stands in."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tokenreduce.errors import MissingSignal
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.ledger import Given
from tokenreduce_integrations.transformers.watch import VisualInput

PROMPT_SIGNALS = frozenset({"prompt_embeddings", "joint_text_embeddings"})


class PromptReader:
    """Reads the text around visual items when the LLM is called.

    Args:
        wanted: names of the signals to read, of :data:`PROMPT_SIGNALS`.
        tokenizer: that of the model; without it special tokens count as text.
        joint: what embeds text in the joint space, if that is wanted.
    """

    def __init__(
        self, wanted: Collection[str], tokenizer: Any | None, joint: JointEncoder | None
    ) -> None:
        self._wanted = PROMPT_SIGNALS.intersection(wanted)
        self._tokenizer = tokenizer
        self._joint = joint

    def read(self, visual: VisualInput, kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The wanted signals of each item, in the order of ``visual.items``.

        Args:
            visual: the visual items of the call.
            kwargs: arguments of the decoder, ``inputs_embeds`` ``(B, S, D)`` among them.

        Raises:
            MissingSignal: if a prompt has no text, or its text is not known.
        """
        if not self._wanted:
            return {}
        embeds: Tensor = kwargs["inputs_embeds"]
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        valid = Given.of(embeds, mask, cache).slots.valid
        text = valid & ~functools.reduce(torch.logical_or, visual.masks.values()).to(valid.device)
        if self._tokenizer is not None and visual.input_ids is not None:
            special = torch.tensor(self._tokenizer.all_special_ids, device=text.device)
            text = text & ~torch.isin(visual.input_ids.to(text.device), special)
        found: dict[str, list[Tensor]] = {}
        prompts = visual.prompts
        rows = sorted(set(prompts))
        for row in rows:
            if not bool(text[row].any()):
                raise MissingSignal(
                    f"prompt {row} has no text beside its visual input, which a strategy asks "
                    f"for ({', '.join(sorted(self._wanted))}). Ask something, or use a strategy "
                    "that does not read the prompt."
                )
        if "prompt_embeddings" in self._wanted:
            of = {row: embeds[row, text[row]] for row in rows}
            found["prompt_embeddings"] = [of[row] for row in prompts]
        if "joint_text_embeddings" in self._wanted:
            of = {row: self._joint_text(visual, text, row).to(embeds.device) for row in rows}
            found["joint_text_embeddings"] = [of[row] for row in prompts]
        return found

    def _joint_text(self, visual: VisualInput, text: Tensor, row: int) -> Tensor:
        if visual.input_ids is None or self._joint is None or self._tokenizer is None:
            raise MissingSignal(
                "joint_text_embeddings: the model was called with embeddings instead of "
                "input_ids, so the text of the prompt is not known. Call it with input_ids."
            )
        ids = visual.input_ids[row, text[row].to(visual.input_ids.device)]
        return self._joint.embed_text(self._tokenizer.decode(ids, skip_special_tokens=True))
