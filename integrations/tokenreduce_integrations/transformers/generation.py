"""Ways of generating that a shorter sequence cannot serve, refused before anything is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tokenreduce.errors import UnsupportedGeneration
from tokenreduce_integrations.transformers.hooks import (
    Replacement,
    Uncopyable,
    replace_method,
    restore_methods,
)


class GenerateWatch(Uncopyable):
    """Wraps ``generate`` of a model while attached; a model without one is left alone.

    Args:
        model: the model.
        refuse: called with the model and the arguments of a generation, before it begins.
    """

    def __init__(self, model: nn.Module, refuse: Callable[[Any, Mapping[str, Any]], None]) -> None:
        self._replaced: list[Replacement] = []
        original: Any = getattr(model, "generate", None)
        if original is None:
            return

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            refuse(model, kwargs)
            return original(*args, **kwargs)

        self._replaced.append(replace_method(model, "generate", wrapper))

    def detach(self) -> None:
        """Restore ``generate``; detaching twice does nothing.

        Raises:
            AttachmentError: if something else has replaced it since.
        """
        replaced, self._replaced = self._replaced, []
        restore_methods(replaced)


def refuse_generation(model: Any, arguments: Mapping[str, Any]) -> None:
    """Refuse what would split visual items, or lose them, on their way to the decoder.

    Args:
        model: the model that generates.
        arguments: those of ``generate``, by name.

    Raises:
        UnsupportedGeneration: naming the option.
    """
    visual = (name for name, value in arguments.items() if value is not None)
    if not any("pixel" in name or name == "mm_encoder_outputs" for name in visual):
        return
    config = arguments.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        return arguments.get(name, getattr(config, name, None))

    if option("prefill_chunk_size") is not None:
        raise UnsupportedGeneration(
            "prefill_chunk_size: a chunk may end inside an image, and what to keep of an image is "
            "decided once, for all of it. Leave prefill_chunk_size out while a pipeline is "
            "attached: the reduced prompt is the shorter one."
        )
    if option("cache_implementation") == "paged":
        raise UnsupportedGeneration(
            "cache_implementation='paged': continuous batching takes token ids alone, so the "
            "visual input would be lost. Leave it out."
        )
