"""Adapters of vision encoders that stand alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from tokenreduce.attachment import Attachment
from tokenreduce.stage import Stage
from tokenreduce_integrations.encoders.attachment import EncoderAttachment


class EncoderAdapter(ABC):
    """See :class:`tokenreduce.attachment.ModelAdapter`."""

    #: What serves stages on these encoders.
    attachment: ClassVar[type[EncoderAttachment]]

    @abstractmethod
    def _encoder(self, model: nn.Module) -> Any:
        """The module that holds the blocks.

        Raises:
            UnsupportedModel: if there is none.
        """

    def attach(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> Attachment:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        encoder = self._encoder(model)
        parameter = next(encoder.parameters())
        for stage in stages:
            stage.reducer.prepare(parameter.device, parameter.dtype)
        return self.attachment(model, encoder, stages)

    def check(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> None:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        self.attachment(model, self._encoder(model), stages).detach()
