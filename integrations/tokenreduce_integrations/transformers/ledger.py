"""What a reduced key-value cache remembers about the sequence that it was made from.

Outside the LLM a cache must report the length of the sequence that the caller knows: ``generate``
slices its inputs by it, multimodal rotary positions are offset by it, and masks built outside are
sized by it. Inside the LLM it must report the tokens that it really holds. The ledger lives on the
cache object, so it follows the cache through interleaved and continued generations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_tokenreduce_ledger"


class Ledger:
    """Bookkeeping of one cache.

    Args:
        valid: ``(B, L)`` which of the held slots are tokens, not padding.
        length: length of the sequence that the caller knows, at least L.
        full: whether every slot is a token, known without reading ``valid``.
    """

    def __init__(self, valid: Tensor, length: int, *, full: bool) -> None:
        self.valid = valid
        self.length = length
        self.full = full
        self.inside_decoder = False

    @staticmethod
    def of(cache: Any) -> Ledger | None:
        """The ledger of a cache; None for no cache, or one that was never reduced."""
        ledger: Ledger | None = getattr(cache, _ATTRIBUTE, None)
        return ledger

    @staticmethod
    def held(cache: Any) -> int:
        """Number of slots that a cache really holds."""
        return 0 if cache is None else int(type(cache).get_seq_length(cache))

    @property
    def hidden(self) -> int:
        """Tokens that the caller knows of and the cache does not hold."""
        return self.length - self.valid.shape[1]

    def aligned(self, held: int, batch: int) -> tuple[Tensor, int]:
        """The slots and the length as they are now.

        A cache may have been cropped since (speculative decoding), or its batch expanded (beams).

        Args:
            held: slots that the cache really holds.
            batch: rows of the coming call.

        Returns:
            validity ``(batch, held)`` and the length that the caller knows.
        """
        valid = self.valid[:, :held]
        if valid.shape[0] != batch:
            valid = valid.repeat_interleave(batch // valid.shape[0], dim=0)
        return valid, self.length - (self.valid.shape[1] - held)

    def install(self, cache: Any) -> None:
        """Put the ledger on a cache, in place of an earlier one."""
        first = _ATTRIBUTE not in vars(cache)
        setattr(cache, _ATTRIBUTE, self)
        if not first:
            return
        kind = type(cache)

        def get_seq_length(layer_idx: int = 0) -> int:
            ledger: Ledger = getattr(cache, _ATTRIBUTE)
            held = int(kind.get_seq_length(cache, layer_idx))
            return held if ledger.inside_decoder else held + ledger.hidden

        def get_mask_sizes(query_length: int, layer_idx: int) -> tuple[int, int]:
            ledger: Ledger = getattr(cache, _ATTRIBUTE)
            length, offset = kind.get_mask_sizes(cache, query_length, layer_idx)
            if ledger.inside_decoder or cache.is_compileable:
                return length, offset
            return length + ledger.hidden, offset

        cache.get_seq_length = get_seq_length
        cache.get_mask_sizes = get_mask_sizes


def ones(batch: int, length: int, device: torch.device) -> Tensor:
    """``(batch, length)`` of True."""
    return torch.ones(batch, length, dtype=torch.bool, device=device)
