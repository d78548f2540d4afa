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


class NeedsJoint(Needy):
    """Needs what no adapter captures."""


NAMES = ("needy", "needs-joint")


@tr.hookimpl
def register_strategies(register: Any) -> None:
    register(
        "needy", f"{__name__}:Needy", summary="needs class attention", needs=("class_attention",)
    )
    register(
        "needs-joint",
        f"{__name__}:NeedsJoint",
        summary="needs joint embeddings",
        needs=("joint_image_embeddings",),
    )
