"""Stages inside vision encoders of transformers that stand alone."""

from __future__ import annotations

from typing import Any

from tokenreduce_integrations.encoders.adapter import EncoderAdapter
from tokenreduce_integrations.encoders.attachment import EncoderAttachment, Given
from tokenreduce_integrations.encoders.dense import Sequences
from tokenreduce_integrations.transformers.vision import patch_grid, prefix_tokens


class TowerAttachment(EncoderAttachment):
    """A pipeline on a vision encoder of transformers."""

    def _prefix(self) -> int:
        return prefix_tokens(self.encoder)

    def _pools_patches(self) -> bool:
        return hasattr(self.model, "classifier") or bool(getattr(self.encoder, "use_head", False))

    def _describe(self, given: Given, batch: int, length: int) -> Sequences:
        layout = patch_grid(self.encoder, given["pixel_values"], length - self._prefix())
        return Sequences(
            layouts=(layout,) * batch, owners=tuple(range(batch)), prefix=self._prefix()
        )

    def _shows_all(self, entry: str, given: Given) -> bool:
        asked = given.get("output_hidden_states")
        return bool(self.encoder.config.output_hidden_states if asked is None else asked)


class TowerAdapter(EncoderAdapter):
    """CLIP, SigLIP, DINOv2 and InternViT encoders, and image classifiers on them."""

    attachment = TowerAttachment

    def _encoder(self, model: Any) -> Any:
        return model.base_model
