"""What a quantization or encoder-pruning backend offers for the loading of a model.

A plugin registers one through the hooks ``register_quantizers`` and ``register_encoder_pruners``
as ``"module:Class"``; the class is instantiated without arguments when a pipeline names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from tokenreduce.plugins import installed


class Quantizer(Protocol):
    """Turns the options of a pipeline into arguments for the loading of a model."""

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        """Keyword arguments that are merged into those of ``from_pretrained``.

        Called before any weight is read, so that a device or an option that cannot work costs
        nothing; and again, with the pruned model, where a vision encoder was pruned first.

        Args:
            options: what the pipeline says under ``model.quantization``, without ``backend``.
            device: where the model will be.
            model: the model that will be quantized; its weights need not be there (meta device).

        Raises:
            PipelineError: if an option is wrong, or the device cannot run the result.
            MissingExtra: if a package is missing.
        """
        ...


class EncoderPruner(Protocol):
    """Makes the vision encoder of a loaded model smaller."""

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """Check that the encoder of a model can be pruned, before any weight is read.

        Args:
            model: the model, whose weights need not be there (meta device).
            options: what the pipeline says under ``model.vision_encoder.prune``, without
                ``backend``.

        Raises:
            PipelineError: if an option is wrong.
            UnsupportedModel: if the model's encoder cannot be pruned.
        """
        ...

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        """Prune the vision encoder in place: after loading, before quantizing and attaching.

        Args:
            model: the loaded model, in evaluation mode, on its device; or one without weights
                (meta device), of which only the shapes that are left matter.
            options: as for :meth:`check`.
            processor: the model's processor, for pruners that look at pictures.

        Raises:
            PipelineError: if an option is wrong.
            UnsupportedModel: if the model's encoder cannot be pruned, or not without weights.
            MediaError: if pictures that the options name cannot be read.
        """
        ...


def find_quantizer(name: str) -> Quantizer:
    """The quantization backend of a name.

    Raises:
        UnknownName: if nothing registered the name.
        MissingExtra: if it needs a package that is not installed.
    """
    return cast(Quantizer, installed().quantizers.resolve(name)())


def find_encoder_pruner(name: str) -> EncoderPruner:
    """The encoder-pruning backend of a name.

    Raises:
        UnknownName: if nothing registered the name.
        MissingExtra: if it needs a package that is not installed.
    """
    return cast(EncoderPruner, installed().encoder_pruners.resolve(name)())
