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
    """

    shape: Shape
    stage: ServedStage | None

    @cached_property
    def kept(self) -> int:
        """How many of its tokens the LLM sees."""
        return len(self.shape) if self.stage is None else self.stage.keep(self.shape.layout)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that reducing it takes."""
        if self.stage is None or self.kept == len(self.shape):
            return ()
        return self.stage.needs

    def to_tensor(self) -> Tensor:
        """``(bytes,)`` for :meth:`from_tensor`."""
        stage = None if self.stage is None else self.stage.to_json()
        text = json.dumps([stage, self.shape.to_list()], separators=(",", ":"))
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
    stage, shape = json.loads(data)
    return ServedItem(
        stage=None if stage is None else ServedStage.from_json(stage),
        shape=Shape.from_list(shape),
    )
