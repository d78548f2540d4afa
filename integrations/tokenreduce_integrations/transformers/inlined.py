"""Stages on BLIP-2, whose ``generate`` encodes and places images in a body of its own."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce_integrations.transformers.attachment import TransformersAttachment
from tokenreduce_integrations.transformers.encoder_decoder import EncoderAttachment
from tokenreduce_integrations.transformers.hooks import outside_compilation


class _Generation(threading.local):
    """Where the image tokens of the generation under way stand; threads may share a model."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None


class InlinedGeneration(TransformersAttachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    ``generate`` is wrapped on the instance to read where the image tokens stand; the projection's
    output tells the features that it places there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generation = _Generation()
        projection: nn.Module = self.owner.language_projection
        self._handles.append(projection.register_forward_hook(self._after_projection))
        original = self.owner.generate
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self._generation.mask = self._image_mask(signature.bind(*args, **kwargs).arguments)
            try:
                return original(*args, **kwargs)
            finally:
                self._generation.mask = None

        self._watch.install("generate", generate)

    def _image_mask(self, arguments: dict[str, Any]) -> Tensor:
        config = self.owner.config
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        if ids is not None:
            return torch.as_tensor(ids == config.image_token_id)
        if embeds is not None:
            token = torch.tensor(config.image_token_id, device=embeds.device)
            return torch.as_tensor((embeds == self.owner.get_input_embeddings()(token)).all(-1))
        # Without a prompt the model makes one: its query tokens and a beginning.
        batch = arguments["pixel_values"].shape[0]
        mask = torch.ones(batch, config.num_query_tokens + 1, dtype=torch.bool)
        mask[:, -1] = False
        return mask.to(arguments["pixel_values"].device)

    @outside_compilation
    def _after_projection(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        mask, self._generation.mask = self._generation.mask, None
        if mask is not None:
            self._watch.place("image", output, mask)


class InlinedEncoderGeneration(InlinedGeneration, EncoderAttachment):
    """The same for a language model that is an encoder-decoder."""
