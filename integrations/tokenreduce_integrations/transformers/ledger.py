"""What a reduced key-value cache remembers about the sequence that it was made from.

Outside the LLM a cache must report the length of the sequence that the caller knows: ``generate``
slices its inputs by it, multimodal rotary positions are offset by it, and masks built outside are
sized by it. Inside the LLM it must report the tokens that it really holds. So there are two objects
with one state: the caller's cache, whose class becomes a subclass of its own that holds the ledger
and follows interleaved and continued generations, beams, copies and pickles; and a view of it in
its original class, which only the LLM sees. Nothing is switched on or off around a call, so an
interrupted one leaves a cache that still tells the truth.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.errors import AttachmentError
from tokenreduce_integrations.transformers.sequence import query_mask


@dataclass(frozen=True)
class Slots:
    """Tokens of a sequence at some depth of the LLM.

    Attributes:
        index: ``(B, L)`` which tokens of the first layer's sequence they are.
        valid: ``(B, L)`` False where one is padding.
        full: whether all are valid, known without reading ``valid``.
    """

    index: Tensor
    valid: Tensor
    full: bool

    @classmethod
    def entered(cls, valid: Tensor, *, full: bool) -> Slots:
        """The sequence of the first layer."""
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return cls(index, valid, full)

    def first(self, length: int) -> Slots:
        """The first ``length`` of them."""
        return replace(self, index=self.index[:, :length], valid=self.valid[:, :length])

    def followed_by(self, more: Slots, offset: int) -> Slots:
        """These, and then others whose indices begin at ``offset``."""
        return Slots(
            torch.cat([self.index, offset + more.index], dim=1),
            torch.cat([self.valid, more.valid], dim=1),
            full=self.full and more.full,
        )

    def rows(self, rows: Tensor) -> Slots:
        """Some rows of the batch."""
        rows = rows.to(self.index.device)
        return replace(self, index=self.index[rows], valid=self.valid[rows])


class Ledger:
    """Bookkeeping of one cache.

    Args:
        valid: ``(B, L)`` which of the slots that the first layer holds are tokens, not padding.
        length: length of the sequence that the caller knows, at least L.
        full: whether every slot is a token, known without reading ``valid``.
        firm: slots of the first layer up to the last one behind which a token is missing in some
            layer; after them the cache holds what the caller knows, one to one. A scalar tensor is
            read only when it is needed.
        deeper: what layers hold from some layer on, where that is less.
    """

    def __init__(
        self,
        valid: Tensor,
        length: int,
        *,
        full: bool,
        firm: Tensor | int,
        deeper: Mapping[int, Slots] | None = None,
    ) -> None:
        self.valid = valid
        self.length = length
        self.full = full
        self.firm = firm
        self.deeper = dict(deeper or {})

    @staticmethod
    def of(cache: Any) -> Ledger | None:
        """The ledger of a cache; None for no cache, an empty one, or one that was never reduced."""
        if isinstance(cache, ReducedCache) and Ledger.held(cache) > 0:
            return cache.ledger
        return None

    @staticmethod
    def held(cache: Any, layer: int = 0) -> int:
        """Number of slots that a layer of a cache really holds."""
        if cache is None:
            return 0
        if isinstance(cache, ReducedCache):
            return cache.held_length(layer)
        return int(cache.get_seq_length(layer))

    @property
    def hidden(self) -> int:
        """Tokens that the caller knows of and the cache does not hold."""
        return self.length - self.valid.shape[1]

    def aligned(self, held: int, batch: int) -> tuple[Tensor, int]:
        """The slots and the length as they are now: a cache may have been cropped since.

        Args:
            held: slots that the cache really holds.
            batch: rows of the coming call.

        Returns:
            validity ``(batch, held)`` and the length that the caller knows.

        Raises:
            AttachmentError: if the batch is another one than the cache was made for.
        """
        if self.valid.shape[0] != batch:
            raise AttachmentError(
                f"the cache holds {self.valid.shape[0]} prompts, the call has {batch}. Change the "
                "batch of a cache through its own methods, such as batch_repeat_interleave."
            )
        return self.valid[:, :held], self.length - (self.valid.shape[1] - held)

    def install(self, cache: Any) -> None:
        """Put the ledger on a cache, in place of an earlier one."""
        if not isinstance(cache, ReducedCache):
            kind: type = type(cache)
            cache.__class__ = _reduced_class(kind)
        cache.ledger = self

    @staticmethod
    def view(cache: Any) -> Any:
        """The cache as the LLM sees it: the same state under its original class."""
        if not isinstance(cache, ReducedCache):
            return cache
        kind = type(cache).__bases__[1]
        inner: Any = object.__new__(kind)
        inner.__dict__ = cache.__dict__
        return inner


@dataclass(frozen=True)
class Given:
    """What the caller gave the decoder, and knows to be cached.

    Attributes:
        slots: the given sequence; invalid where the caller padded.
        held: what the first layer of the cache holds.
        past: length of the cached sequence as the caller knows it.
        ledger: of the cache, or None.
    """

    slots: Slots
    held: Slots
    past: int
    ledger: Ledger | None

    @classmethod
    def of(cls, embeds: Tensor, mask: object, cache: Any) -> Given:
        """Read a call.

        Args:
            embeds: ``(B, S, D)``.
            mask: the attention mask, see :func:`query_mask`.
            cache: the key-value cache, or None.

        Raises:
            AttachmentError: if the batch is another one than the cache was made for.
            UnsupportedModel: if the mask spans less than the sequence.
        """
        batch, length = embeds.shape[:2]
        held, ledger = Ledger.held(cache), Ledger.of(cache)
        padded = held > 0 and isinstance(mask, Tensor) and mask.ndim == 2
        if ledger is not None:
            past_valid, past = ledger.aligned(held, batch)
            past_full = ledger.full
        elif padded:
            past_valid, past, past_full = mask[:, :held].bool(), held, False  # type: ignore[index]
        else:
            past_valid, past = embeds.new_ones((batch, held), dtype=torch.bool), held
            past_full = True
        tokens = query_mask(mask, past, batch, length)
        full = tokens is None
        if tokens is None:
            tokens = embeds.new_ones((batch, length), dtype=torch.bool)
        return cls(
            Slots.entered(tokens, full=full),
            Slots.entered(past_valid, full=past_full),
            past,
            ledger,
        )


class ReducedCache:
    """Mixed into the class of a cache that holds a reduced sequence."""

    ledger: Ledger

    def held_length(self, layer_idx: int = 0) -> int:
        """Number of slots that the cache really holds."""
        return int(super().get_seq_length(layer_idx))  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        held = self.held_length(layer_idx)
        return held + self.ledger.hidden if held else 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        if self.held_length() == 0 or self.is_compileable:  # type: ignore[attr-defined]
            return length, offset
        return length + self.ledger.hidden, offset

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        if self.held_length() > 0:
            raise AttachmentError(
                "this cache holds a reduced sequence: continue it while the pipeline that made it "
                "is attached, or start with a new cache."
            )
        self._forget()
        return self.update(keys, values, layer_idx, *args, **kw)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, or crop to a positive length as the caller knows it.

        Raises:
            AttachmentError: if the cut lies where tokens are missing.
        """
        length, removed = self.get_seq_length(), -tokens_to_remove
        if removed < 0:
            removed = max(0, length + removed)
        if 0 < removed < length and removed > self.held_length() - int(self.ledger.firm):
            raise AttachmentError(
                f"the cache cannot be cropped by {removed} tokens: it would end inside or before "
                "visual tokens of which some were dropped. Crop to the end of the last visual "
                "item or later, or start with a new cache."
            )
        super().crop(-removed)  # type: ignore[misc]

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        rows = torch.arange(self.ledger.valid.shape[0]).repeat_interleave(repeats)
        self._select(rows)

    def _forget(self) -> None:
        """Become an ordinary cache again: what was reduced is gone."""
        del self.ledger
        self.__class__ = type(self).__bases__[1]

    def _select(self, rows: Tensor) -> None:
        ledger = self.ledger
        ledger.valid = ledger.valid[rows.to(ledger.valid.device)]
        ledger.deeper = {layer: slots.rows(rows) for layer, slots in ledger.deeper.items()}

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__bases__[1],), dict(vars(self))


@functools.cache
def _reduced_class(kind: type) -> type:
    return type(f"Reduced{kind.__name__}", (ReducedCache, kind), {"__module__": __name__})


def _rebuild(kind: type) -> Any:
    """An empty cache of a reduced class, for copies and pickles."""
    return object.__new__(_reduced_class(kind))
