"""What the processor tells the worker of each visual item: its settings and its shape.

It travels as one tensor of bytes among the item's other fields, through vLLM's batching, caches and
wires, so an item that was encoded for one setting is never taken for another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final

import torch
from torch import Tensor

from tokenreduce.errors import ServingError
from tokenreduce_integrations.vllm.settings import ServedStage
from tokenreduce_integrations.vllm.shapes import Shape

#: The field of an item, and the argument of ``embed_multimodal``, that holds it.
FIELD: Final = "tokenreduce"


@dataclass(frozen=True, kw_only=True)
class ServedItem:
    """A visual item of a request.

    Attributes:
        shape: where its tokens lie.
        stage: how it is reduced; None where its modality is left as it is.
        sequence: text that the model has between the item's tokens and that moves as they go, as
            ids of text in their order, and ``-n`` for n visual tokens; empty if there is none.
    """

    shape: Shape
    stage: ServedStage | None
    sequence: tuple[int, ...] = ()

    @cached_property
    def kept_parts(self) -> tuple[int, ...]:
        """How many tokens of each of its parts the LLM sees."""
        if self.stage is None:
            return tuple(map(len, self.shape.parts))
        return tuple(self.stage.keep(part.layout) for part in self.shape.parts)

    @property
    def kept(self) -> int:
        """How many of its tokens the LLM sees."""
        return sum(self.kept_parts)

    @property
    def text(self) -> tuple[int, ...]:
        """The ids of the text between its tokens."""
        return tuple(each for each in self.sequence if each >= 0)

    def ids(self, placeholder: int) -> list[int]:
        """The item in a prompt before reduction.

        Args:
            placeholder: what stands for a visual token.
        """
        if not self.sequence:
            return [placeholder] * len(self.shape)
        runs = ([each] if each >= 0 else [placeholder] * -each for each in self.sequence)
        return [each for run in runs for each in run]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that reducing it takes."""
        if self.stage is None or self.kept == len(self.shape):
            return ()
        return self.stage.needs

    def to_tensor(self) -> Tensor:
        """``(bytes,)`` for :meth:`from_tensor`."""
        stage = None if self.stage is None else self.stage.to_json()
        text = json.dumps([stage, self.shape.to_list(), self.sequence], separators=(",", ":"))
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, data: Tensor) -> ServedItem:
        """What :meth:`to_tensor` gave."""
        return _from_bytes(data.cpu().numpy().tobytes())

    @classmethod
    def from_batch(cls, data: Tensor | Sequence[Tensor] | None) -> list[ServedItem]:
        """The items of a call of the encoder.

        Args:
            data: what vLLM made of the field: stacked, or a list where lengths differ.

        Raises:
            ServingError: if items come without it.
        """
        if data is None:
            raise ServingError(
                "visual items reached the model without settings: they did not come through "
                "TokenReduce's processor, and how to reduce them is not known."
            )
        return [cls.from_tensor(each) for each in data]


@lru_cache(maxsize=1024)
def _from_bytes(data: bytes) -> ServedItem:
    stage, shape, sequence = json.loads(data)
    return ServedItem(
        stage=None if stage is None else ServedStage.from_json(stage),
        shape=Shape.from_list(shape),
        sequence=tuple(sequence),
    )
