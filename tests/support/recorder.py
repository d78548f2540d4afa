"""A plugin whose strategy remembers the signals that it was given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tokenreduce as tr
from tokenreduce.capabilities import CountClass

SEEN: dict[str, list[Tensor]] = {}


@dataclass(frozen=True, kw_only=True)
class Recorder(tr.Scorer):
    """Keeps tokens of large norm, and remembers every signal, item by item.

    Args:
        names: the signals that it asks for.
    """

    names: tuple[str, ...] = (
        "vision_features",
        "class_attention",
        "received_attention",
        "keys",
        "queries",
    )

    @property
    def needs(self) -> tuple[str, ...]:
        return self.names

    @property
    def count_class(self) -> CountClass:
        # What an adaptive strategy keeps differs between items, so it sees them one by one.
        return "adaptive"

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        for name, signal in tokens.signals.items():
            SEEN.setdefault(name, []).append(signal[0])
        return tokens.features.norm(dim=-1)


@tr.hookimpl
def register_strategies(register: Any) -> None:
    register("recorder", f"{__name__}:Recorder", summary="remembers signals", count="adaptive")
