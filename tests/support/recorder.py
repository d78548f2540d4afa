"""A plugin whose strategy remembers the signals that it was given."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tokenreduce as tr

SEEN: dict[str, list[Tensor]] = {}


@dataclass(frozen=True, kw_only=True)
class Recorder(tr.Scorer):
    """Keeps what the class token attends to, and remembers every signal."""

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        for name, signal in tokens.signals.items():
            SEEN.setdefault(name, []).append(signal)
        return tokens.signal("class_attention")


@tr.hookimpl
def register_strategies(register: Any) -> None:
    register(
        "recorder",
        f"{__name__}:Recorder",
        summary="remembers signals",
        needs=("vision_features", "class_attention", "received_attention", "keys", "queries"),
    )
