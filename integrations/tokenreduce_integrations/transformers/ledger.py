"""What a reduced key-value cache remembers about the sequence that it was made from.

Outside the LLM a cache must report the length of the sequence that the caller knows: ``generate``
slices its inputs by it, multimodal rotary positions are offset by it, and masks built outside are
sized by it. Inside the LLM it must report the tokens that it really holds. The ledger lives on the
cache object, whose class becomes a subclass of its own that keeps the two apart, so it follows the
cache through interleaved and continued generations, beams, copies and pickles.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from tokenreduce.errors import AttachmentError


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
        """The ledger of a cache; None for no cache, an empty one, or one that was never reduced."""
        if isinstance(cache, ReducedCache) and Ledger.held(cache) > 0:
            return cache.ledger
        return None

    @staticmethod
    def held(cache: Any) -> int:
        """Number of slots that a cache really holds."""
        if cache is None:
            return 0
        if isinstance(cache, ReducedCache):
            return cache.held_length()
        return int(cache.get_seq_length())

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


class ReducedCache:
    """Mixed into the class of a cache that holds a reduced sequence."""

    ledger: Ledger

    def held_length(self, layer_idx: int = 0) -> int:
        """Number of slots that the cache really holds."""
        return int(super().get_seq_length(layer_idx))  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        held = self.held_length(layer_idx)
        return held if self.ledger.inside_decoder or held == 0 else held + self.ledger.hidden

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)  # type: ignore[misc]
        inside = self.ledger.inside_decoder or self.held_length() == 0
        if inside or self.is_compileable:  # type: ignore[attr-defined]
            return length, offset
        return length + self.ledger.hidden, offset

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        if self.ledger.inside_decoder:
            return super().update(keys, values, layer_idx, *args, **kw)  # type: ignore[misc]
        if self.held_length() > 0:
            raise AttachmentError(
                "this cache holds a reduced sequence: continue it while the pipeline that made it "
                "is attached, or start with a new cache."
            )
        self._forget()
        return self.update(keys, values, layer_idx, *args, **kw)

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
        self.ledger.valid = self.ledger.valid.repeat_interleave(repeats, dim=0)

    def _forget(self) -> None:
        """Become an ordinary cache again: what was reduced is gone."""
        del self.ledger
        self.__class__ = type(self).__bases__[1]

    def _select(self, rows: Tensor) -> None:
        self.ledger.valid = self.ledger.valid[rows.to(self.ledger.valid.device)]

    def __reduce__(self) -> Any:
        return _rebuild, (type(self).__bases__[1],), dict(vars(self))


@functools.cache
def _reduced_class(kind: type) -> type:
    return type(f"Reduced{kind.__name__}", (ReducedCache, kind), {"__module__": __name__})


def _rebuild(kind: type) -> Any:
    """An empty cache of a reduced class, for copies and pickles."""
    return object.__new__(_reduced_class(kind))
