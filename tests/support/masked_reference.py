"""Cuts between the layers of any decoder, recomputed by masking: the unmodified model, in which the
layers after the cut do not attend to what was dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.tiny_models import Case


def masked_logits(case: Case, decoder: Any, layer: int, dropped: Tensor) -> Tensor:
    """Logits ``(B, S, V)`` of a forward without a cache.

    ``dropped`` ``(B, S)`` are the columns that layers from ``layer`` on do not attend to.
    """
    handles = [
        module.register_forward_pre_hook(_masking(module, decoder, dropped), with_kwargs=True)
        for module in list(decoder.layers)[layer:]
    ]
    try:
        with torch.no_grad():
            return case.model(**case.batch(), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _masking(module: nn.Module, decoder: Any, dropped: Tensor) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        length = dropped.shape[1]
        mask = kwargs.get("attention_mask")
        itself = torch.eye(length, dtype=torch.bool)
        if mask is None:
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            if decoder.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        open_ = ~dropped[:, None, None] | itself
        if mask.dtype == torch.bool:
            mask = mask & open_
        else:
            mask = mask.expand(len(dropped), -1, -1, -1)
            mask = mask.masked_fill(~open_, torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return hook
