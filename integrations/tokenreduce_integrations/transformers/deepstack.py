"""DeepStack: features of several encoder layers, added in the first layers of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenreduce_integrations.transformers.sequence import ReducedItem, SequencePlan


def shorten_deepstack(
    kwargs: Mapping[str, Any], plan: SequencePlan, items: Sequence[ReducedItem]
) -> dict[str, Any]:
    """Reduce DeepStack features as the tokens that they belong to.

    Args:
        kwargs: arguments of the decoder; ``visual_pos_masks`` ``(B, S)`` marks visual columns, and
            each of ``deepstack_visual_embeds`` is ``(V, D)``, a row for each of them in reading
            order.
        plan: the shorter sequence.
        items: what became of each visual item.

    Returns:
        both arguments for the shorter sequence.
    """
    mask: Tensor | None = kwargs.get("visual_pos_masks")
    if mask is None:
        return {}
    row_of = _rows(mask)
    embeds = [_merge(layer, row_of, items) for layer in kwargs["deepstack_visual_embeds"]]
    rows = row_of.gather(1, plan.columns).masked_fill(~plan.valid, -1)
    kept = rows[rows >= 0]
    return {
        "visual_pos_masks": rows >= 0,
        "deepstack_visual_embeds": [layer[kept.to(layer.device)] for layer in embeds],
    }


def shorten_layerwise(
    kwargs: Mapping[str, Any], plan: SequencePlan, items: Sequence[ReducedItem]
) -> dict[str, Any]:
    """Reduce features that stand for the visual embeddings themselves (Granite 4 Vision).

    Args:
        kwargs: arguments of the decoder; ``vision_mask`` ``(B, S, 1)`` marks visual columns, where
            ``inputs_embeds`` is zero, and ``deepstack_features`` maps a layer to ``(V, D)``.
        plan: the shorter sequence.
        items: what became of each visual item.

    Returns:
        the three arguments for the shorter sequence.
    """
    mask: Tensor | None = kwargs.get("vision_mask")
    if mask is None:
        return {}
    row_of = _rows(mask[..., 0])
    rows = row_of.gather(1, plan.columns).masked_fill(~plan.valid, -1)
    kept = rows[rows >= 0]
    columns = plan.columns[..., None].expand(-1, -1, kwargs["inputs_embeds"].shape[-1])
    return {
        "vision_mask": (rows >= 0)[..., None],
        "deepstack_features": {
            layer: _merge(features, row_of, items)[kept.to(features.device)]
            for layer, features in kwargs["deepstack_features"].items()
        },
        "inputs_embeds": kwargs["inputs_embeds"].gather(1, columns) * plan.valid[..., None],
    }


def layerwise_features(kwargs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """The features that enter first, which strategies read in place of the zero embeddings."""
    first: Tensor = next(iter(kwargs["deepstack_features"].values()))
    return first[_rows(kwargs["vision_mask"][..., 0])[rows, columns].to(first.device)]


def _rows(mask: Tensor) -> Tensor:
    """The row of each visual column's features, -1 elsewhere."""
    row_of = torch.full(mask.shape, -1, dtype=torch.long, device=mask.device)
    row_of[mask] = torch.arange(int(mask.sum()), device=mask.device)
    return row_of


def _merge(layer: Tensor, row_of: Tensor, items: Sequence[ReducedItem]) -> Tensor:
    """Write merged features at the rows of the tokens that they stand at."""
    merged = layer
    for item in items:
        if item.reduction is None or item.reduction.gathers:
            continue
        if merged is layer:
            merged = layer.clone()
        rows = row_of[item.prompt, item.columns].to(layer.device)
        merged[rows[item.reduction.positions[0]]] = item.reduction.apply(layer[rows][None])[0]
    return merged
