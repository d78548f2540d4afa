"""A plugin with a strategy that needs a signal."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

import tokenreduce as tr


@dataclass(frozen=True, kw_only=True)
class Needy(tr.Scorer):
    """Keeps the tokens that the class token attends to."""

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        return tokens.signal("class_attention")


@tr.hookimpl
def register_strategies(register: Any) -> None:
    register(
        "needy", f"{__name__}:Needy", summary="needs class attention", needs=("class_attention",)
    )
