"""Reducing encoded items in a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tokenreduce.errors import ReductionError
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce_integrations.vllm.items import ServedItem


def reduce_items(
    features: Sequence[Tensor],
    items: Sequence[ServedItem],
    signals: Mapping[str, Sequence[Tensor]],
) -> list[Reduction | None]:
    """What becomes of each item; None where it stays as it is.

    Items of equal settings and layout are reduced in one call.

    Args:
        features: ``(N, D)`` of each item.
        items: their settings and shapes.
        signals: of each item, named; more than a strategy asks for does no harm.

    Raises:
        ReductionError: if the encoder gave other tokens than the processor counted, or a strategy
            keeps another number than it promised.
    """
    for feature, item in zip(features, items, strict=True):
        if len(feature) != len(item.shape):
            raise ReductionError(
                f"the encoder gave {len(feature)} tokens for an item, the processor counted "
                f"{len(item.shape)}: this release of vLLM lays out items in a way that TokenReduce "
                "does not know."
            )
    groups: dict[Reducer, list[int]] = {}
    for index, item in enumerate(items):
        if item.stage is not None and item.kept < len(item.shape):
            groups.setdefault(item.stage.reducer(), []).append(index)
    outcomes: list[Reduction | None] = [None] * len(items)
    for given, members in groups.items():
        reducer = _prepared(given, features[0].device, features[0].dtype)
        packed = PackedTokens(
            features=torch.cat([features[i] for i in members]),
            layouts=tuple(items[i].shape.layout for i in members),
            signals=_packed_signals(reducer, members, signals),
        )
        for i, reduction in zip(
            members, reduce_packed(packed, [reducer] * len(members)), strict=True
        ):
            if reduction.kept != items[i].kept:
                raise ReductionError(
                    f"strategy {reducer.name!r} kept {reduction.kept} of {len(items[i].shape)} "
                    f"tokens, and the prompt has places for {items[i].kept}: its count does not "
                    "follow from budget and layout, as it is registered to."
                )
            outcomes[i] = reduction
    return outcomes


def _packed_signals(
    reducer: Reducer, members: Sequence[int], signals: Mapping[str, Sequence[Tensor]]
) -> dict[str, Tensor | Sequence[Tensor]]:
    vocabulary = installed().signals
    wanted = {name: [signals[name][i] for i in members] for name in reducer.needs}
    return {
        name: torch.cat(list(each)) if vocabulary[name].per_token else each
        for name, each in wanted.items()
    }


@lru_cache(maxsize=64)
def _prepared(reducer: Reducer, device: torch.device, dtype: torch.dtype) -> Reducer:
    reducer.prepare(device, dtype)
    return reducer
