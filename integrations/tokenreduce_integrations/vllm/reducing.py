"""Reducing encoded items in a worker."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.errors import ReductionError, TokenReduceError
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.vllm.items import ServedItem
from tokenreduce_integrations.vllm.settings import ServedStage
from tokenreduce_integrations.vllm.shapes import Shape

#: Below that of vLLM, whose handlers show it.
_LOG = logging.getLogger("vllm.tokenreduce")


class Kept(NamedTuple):
    """What is left of an item.

    Attributes:
        features: ``(M, D)``.
        positions: ``(M,)`` which of its tokens each stands at, ascending.
    """

    features: Tensor
    positions: Tensor


class _Part(NamedTuple):
    """What is reduced by itself: ``features`` ``(N, D)`` that go to the LLM, its settings, and
    its signals ``(N, ...)``."""

    features: Tensor
    shape: Shape
    stage: ServedStage | None
    kept: int
    signals: Mapping[str, Tensor]


def reduce_items(
    features: Sequence[Tensor],
    items: Sequence[ServedItem],
    signals: Mapping[str, Sequence[Tensor]],
    channels: int | None = None,
) -> list[Kept]:
    """What is left of each item.

    Items of equal settings and layout are reduced in one call.

    Args:
        features: ``(N, D)`` of each item.
        items: their settings and shapes.
        signals: of each item, named; more than a strategy asks for does no harm.
        channels: how many of the channels strategies see; the others are reduced alike.

    Raises:
        ReductionError: if the encoder gave other tokens than the processor counted.
    """
    per_item = [
        _parts(feature, item, {name: each[index] for name, each in signals.items()})
        for index, (feature, item) in enumerate(zip(features, items, strict=True))
    ]
    parts = [part for parts in per_item for part in parts]
    outcomes = iter(_reduce_parts(parts, channels))
    return [_joined([(part, next(outcomes)) for part in parts], channels) for parts in per_item]


def _parts(features: Tensor, item: ServedItem, signals: Mapping[str, Tensor]) -> list[_Part]:
    if len(features) != len(item.shape):
        raise ReductionError(
            f"the encoder gave {len(features)} tokens for an item, the processor counted "
            f"{len(item.shape)}: this release of vLLM lays out items in a way that TokenReduce "
            "does not know."
        )
    vocabulary = installed().signals
    ends = list(accumulate(map(len, item.shape.parts)))
    return [
        _Part(
            features[end - len(shape) : end],
            shape,
            item.stage,
            kept,
            {
                name: signal[end - len(shape) : end] if vocabulary[name].per_token else signal
                for name, signal in signals.items()
            },
        )
        for shape, kept, end in zip(item.shape.parts, item.kept_parts, ends, strict=True)
    ]


def _reduce_parts(parts: Sequence[_Part], channels: int | None) -> list[Reduction | None]:
    """What becomes of each part; None where it stays as it is."""
    groups: dict[Reducer, list[int]] = {}
    for index, part in enumerate(parts):
        if part.stage is not None and part.kept < len(part.shape):
            groups.setdefault(part.stage.reducer(), []).append(index)
    outcomes: list[Reduction | None] = [None] * len(parts)
    for given, members in groups.items():
        reducer = _prepared(given, parts[0].features.device, parts[0].features.dtype)
        reductions = _reduced([parts[index] for index in members], reducer, channels)
        for index, reduction in zip(members, reductions, strict=True):
            outcomes[index] = reduction
    return outcomes


def _reduced(parts: Sequence[_Part], reducer: Reducer, channels: int | None) -> Sequence[Reduction]:
    """Each part reduced; evenly spaced tokens of one that cannot be, which the log tells.

    Whatever raises in a worker ends the engine, and with it the requests of everyone else.
    """
    packed = _packed(parts, reducer, channels)
    try:
        reductions = reduce_packed(packed, [reducer] * len(parts))
        for reduction, part in zip(reductions, parts, strict=True):
            if reduction.kept != part.kept:
                raise ReductionError(
                    f"strategy {reducer.name!r} kept {reduction.kept} of {len(part.shape)} "
                    f"tokens, and the prompt has places for {part.kept}: its count does not "
                    "follow from budget and layout, as it is registered to."
                )
    except TokenReduceError as error:
        if len(parts) > 1:
            return [_reduced([part], reducer, channels)[0] for part in parts]
        _LOG.error(
            "%s could not choose among the %d tokens of an item, of which %d evenly spaced ones "
            "stay instead: %s",
            reducer.name,
            len(parts[0].shape),
            parts[0].kept,
            error,
        )
        return [_evenly_spaced(packed.bucket([0]), parts[0].kept)]
    return reductions


def _evenly_spaced(tokens: VisualTokens, kept: int) -> Reduction:
    """Protected tokens, and others at even distances."""
    free = tokens.layout.free
    places = kept - tokens.layout.protected_count
    chosen = free[torch.arange(places) * len(free) // max(1, places)]
    guarded = tokens.layout.protected.nonzero().squeeze(1)
    return Reduction.from_kept(
        tokens, torch.cat([chosen, guarded])[None].to(tokens.features.device)
    )


def _packed(parts: Sequence[_Part], reducer: Reducer, channels: int | None) -> PackedTokens:
    vocabulary = installed().signals
    signals: dict[str, Tensor | Sequence[Tensor]] = {}
    for name in reducer.needs:
        each = [part.signals[name] for part in parts]
        signals[name] = torch.cat(each) if vocabulary[name].per_token else each
    return PackedTokens(
        features=torch.cat([part.features[:, :channels] for part in parts]),
        layouts=tuple(part.shape.layout for part in parts),
        signals=signals,
    )


def _joined(outcomes: Sequence[tuple[_Part, Reduction | None]], channels: int | None) -> Kept:
    """What is left of an item, of what became of its parts."""
    features, positions, start = [], [], 0
    for part, reduction in outcomes:
        if reduction is None:
            features.append(part.features)
            own = torch.arange(len(part.shape), device=part.features.device)
        else:
            features.append(reduction.features[0])
            if channels is not None:
                carried = reduction.apply(part.features[None, :, channels:])[0]
                features[-1] = torch.cat([features[-1], carried], dim=1)
            own = reduction.positions[0]
        positions.append(own + start)
        start += len(part.shape)
    if len(features) == 1:
        return Kept(features[0], positions[0])
    return Kept(torch.cat(features), torch.cat(positions))


@lru_cache(maxsize=64)
def _prepared(reducer: Reducer, device: torch.device, dtype: torch.dtype) -> Reducer:
    reducer.prepare(device, dtype)
    return reducer
