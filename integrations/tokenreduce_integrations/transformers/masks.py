"""Attention masks that a model builds before its decoder, rebuilt for the shorter sequence.

Families whose image tokens see one another both ways hand their decoder finished masks. A window
of attention counts tokens of the sequence that the decoder sees, as its cache does; so masks are
not gathered but built anew by the functions of transformers, from the blocks that the given mask
shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tokenreduce_integrations.transformers.sequence import SequencePlan


@dataclass(frozen=True, kw_only=True)
class BuiltMask:
    """A mask that was built for the given sequence, and the sequence that needs one.

    Attributes:
        given: ``(B, 1, S, past + S)``, or a mapping of those by kind of attention.
        config: the decoder's.
        embeds: ``(B, S', D)`` of the shorter sequence.
        valid: ``(B, L + S')`` which of the cached slots and of the tokens are no padding.
        plan: the shorter sequence; None where nothing goes.
        past: length of the cached sequence as the caller knows it.
        length: S.
        cache: the cache, telling the length that it really holds.
    """

    given: Any
    config: Any
    embeds: Tensor
    valid: Tensor
    plan: SequencePlan | None
    past: int
    length: int
    cache: Any


MaskBuilder = Callable[[BuiltMask], Any]


def is_built(mask: object) -> bool:
    """Whether a mask is more than which tokens are padding."""
    return isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)


def left_to_decoder(mask: BuiltMask) -> Any:
    """Which tokens are no padding: the decoder would have built the same itself (Inkling)."""
    return mask.valid.long()


def blocks_then_window(mask: BuiltMask) -> Any:
    """Blocks that see both ways, the window of a sliding layer cutting through them (Gemma 3)."""
    return _rebuilt(mask, _cut_blocks)


def window_then_blocks(mask: BuiltMask) -> Any:
    """Blocks that see both ways whatever the window (PaliGemma, Molmo 2)."""
    return _rebuilt(mask, _whole_blocks)


def _rebuilt(mask: BuiltMask, sliding: Callable[[BuiltMask, Tensor], Any]) -> Any:
    """The mask of each kind of attention that one was given for."""
    from transformers.masking_utils import create_causal_mask

    if mask.length == 1:
        return mask.valid.long()
    kinds = mask.given if isinstance(mask.given, dict) else {"full_attention": mask.given}
    if not all(isinstance(given, Tensor) and given.ndim == 4 for given in kinds.values()):
        return mask.valid.long()
    rebuilt = {}
    for kind, given in kinds.items():
        blocks = _blocks(mask, given)
        if kind == "sliding_attention":
            rebuilt[kind] = sliding(mask, blocks)
        else:
            rebuilt[kind] = create_causal_mask(**_sequence(mask), block_sequence_ids=blocks)
    return rebuilt if isinstance(mask.given, dict) else rebuilt["full_attention"]


def _whole_blocks(mask: BuiltMask, blocks: Tensor) -> Any:
    from transformers.masking_utils import create_sliding_window_causal_mask

    return create_sliding_window_causal_mask(**_sequence(mask), block_sequence_ids=blocks)


def _cut_blocks(mask: BuiltMask, blocks: Tensor) -> Any:
    from transformers.masking_utils import (
        blockwise_overlay,
        create_causal_mask,
        sliding_window_overlay,
    )

    kinds = list(getattr(mask.cache, "is_sliding", None) or [])
    layer = kinds.index(True) if True in kinds else 0
    if mask.cache is not None:
        length, offset = mask.cache.get_mask_sizes(mask.embeds.shape[1], layer)
        missing = max(0, length + offset - blocks.shape[1])
        blocks = functional.pad(blocks, (0, missing), value=-1)
    return create_causal_mask(
        **_sequence(mask),
        or_mask_function=blockwise_overlay(blocks),
        and_mask_function=sliding_window_overlay(mask.config.sliding_window),
        layer_idx=layer,
    )


def _sequence(mask: BuiltMask) -> dict[str, Any]:
    return {
        "config": mask.config,
        "inputs_embeds": mask.embeds,
        "attention_mask": mask.valid.long(),
        "past_key_values": mask.cache,
        "position_ids": None,
    }


def _blocks(mask: BuiltMask, given: Tensor) -> Tensor:
    """``(B, L + S')`` the block that each slot belongs to, -1 for padding and for cached slots.

    A token sees to the end of its block, and no further than itself if it belongs to none; so the
    last column that it sees names the block.
    """
    first = mask.past if given.shape[-1] >= mask.past + mask.length else -mask.length
    square = given[:, 0, :, first:][..., : mask.length]
    sees = square if square.dtype == torch.bool else square == 0
    blocks = mask.length - 1 - sees.flip(2).to(torch.uint8).argmax(2)
    batch, held = mask.embeds.shape[0], mask.valid.shape[1] - mask.embeds.shape[1]
    blocks = blocks.expand(batch, -1)
    if mask.plan is not None:
        blocks = blocks.gather(1, mask.plan.columns)
    blocks = blocks.masked_fill(~mask.valid[:, held:], -1)
    return torch.cat([blocks.new_full((batch, held), -1), blocks], dim=1)
