"""Stages on models whose text decoder embeds images in the pass that runs its layers."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.attachment import TransformersAttachment
from tokenreduce_integrations.transformers.hooks import outside_compilation
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.watch import EncodedItem, Handed, VisualInput


class Embedded(NamedTuple):
    """A sequence with its images in place.

    Attributes:
        embeds: ``(B, S, D)``.
        mask: ``(B, S)`` columns that hold visual tokens.
        lengths: number of tokens of each image, in reading order.
    """

    embeds: Tensor
    mask: Tensor
    lengths: list[int]


class EmbeddingAttachment(TransformersAttachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    The model's own embedding is called before its decoder, which then is given embeddings.
    """

    media: ClassVar[tuple[str, ...]]
    """Arguments that the embedding consumes."""

    @abstractmethod
    def _embed(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Embedded | None:
        """The sequence with its images in place; None for a call without any."""

    def _make_watch(self, joint: JointEncoder | None) -> Handed:
        return Handed()

    @outside_compilation
    def _before_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids = kwargs.get("input_ids")
        embedded = None if ids is None else self._embed(ids, kwargs)
        if embedded is None:
            return super()._before_decoder(module, args, kwargs)
        items = [EncodedItem(Layout.line(length), {}) for length in embedded.lengths]
        if items:
            self._watch.visual = VisualInput({"image": embedded.mask}, {"image": items}, ids)
        consumed = dict.fromkeys(("input_ids", *self.media))
        given = {**kwargs, **consumed, "inputs_embeds": embedded.embeds}
        shortened = super()._before_decoder(module, args, given)
        return (args, given) if shortened is None else shortened


class _Lengths(threading.local):
    """Numbers of tokens of the images being embedded; threads may share a model."""

    def __init__(self) -> None:
        self.found: list[int] = []


class Phi4Attachment(EmbeddingAttachment):
    """Phi-4-multimodal, whose decoder has a module that embeds images and sound."""

    media = (
        "image_pixel_values",
        "image_sizes",
        "image_attention_mask",
        "audio_input_features",
        "audio_embed_sizes",
        "audio_attention_mask",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lengths = _Lengths()
        projection: nn.Module = self.owner.image_embed.img_projection_down
        self._handles.append(projection.register_forward_hook(self._after_projection))

    def _embed(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Embedded | None:
        if kwargs.get("image_pixel_values") is None:
            return None
        self._lengths.found = []
        words = self.decoder.embed_tokens(ids)
        embeds = self.owner(ids, words, **{name: kwargs.get(name) for name in self.media})
        mask = torch.as_tensor(ids == self.owner.image_token_id)
        return Embedded(embeds, mask, self._lengths.found)

    @outside_compilation
    def _after_projection(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._lengths.found.append(output.shape[1])


class ChameleonAttachment(EmbeddingAttachment):
    """Chameleon, whose decoder embeds the codes of images."""

    media = ("pixel_values", "mm_encoder_outputs")

    def _embed(self, ids: Tensor, kwargs: Mapping[str, Any]) -> Embedded | None:
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is None and kwargs.get("pixel_values") is None:
            return None
        if encoded is None:
            encoded = self.decoder.get_image_features(kwargs["pixel_values"], return_dict=True)
        words = self.decoder.get_input_embeddings()(ids)
        features = encoded.pooler_output.to(words.device, words.dtype)
        mask = self.decoder.get_placeholder_mask(ids, inputs_embeds=words, image_features=features)
        lengths = [feature.shape[0] for feature in features]
        return Embedded(words.masked_scatter(mask, features), mask[..., 0], lengths)
