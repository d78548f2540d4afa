"""Further arguments of a decoder with one entry for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenreduce_integrations.transformers.sequence import ReducedItem, SequencePlan


def gather_arguments(*names: str) -> Callable[..., dict[str, Any]]:
    """What shortens arguments ``(B, S, ...)`` by keeping the entries of the kept columns.

    Right for arguments that are alike for all visual tokens, so that a merged token's is that of
    the place where it stands.
    """

    def shorten(
        kwargs: Mapping[str, Any], plan: SequencePlan, items: Sequence[ReducedItem]
    ) -> dict[str, Any]:
        return {
            name: _gather(kwargs[name], plan)
            for name in names
            if isinstance(kwargs.get(name), Tensor)
        }

    return shorten


def _gather(value: Tensor, plan: SequencePlan) -> Tensor:
    columns = plan.columns.to(value.device)
    columns = columns.view(*columns.shape, *[1] * (value.ndim - 2))
    return value.gather(1, columns.expand(-1, -1, *value.shape[2:]))
