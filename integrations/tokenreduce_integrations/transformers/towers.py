"""Stages inside vision encoders of transformers that stand alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokenreduce.attachment import Attachment
from tokenreduce.stage import Stage
from tokenreduce_integrations.encoders.attachment import EncoderAttachment, Given
from tokenreduce_integrations.encoders.dense import Sequences
from tokenreduce_integrations.transformers.vision import patch_grid, prefix_tokens


class TowerAdapter:
    """CLIP, SigLIP, DINOv2 and InternViT encoders, and image classifiers on them."""

    def attach(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> Attachment:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        parameter = next(model.parameters())
        for stage in stages:
            stage.reducer.prepare(parameter.device, parameter.dtype)
        return TowerAttachment(model, model.base_model, stages)

    def check(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> None:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        TowerAttachment(model, model.base_model, stages).detach()


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
