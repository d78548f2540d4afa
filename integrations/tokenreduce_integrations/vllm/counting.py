"""How many tokens of an item stay, told before the encoder runs.

vLLM lays out the prompt, its caches and its schedule by counts that its processor states, in a
process that has no model. What a strategy will keep must therefore follow from its budget and from
where the tokens lie; the same function gives the same number in the worker.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from tokenreduce.errors import ServingError, TokenReduceError
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce.wrappers import Chain, GroupWise

#: Channels of the stand-ins: a multiple of the usual numbers of attention heads.
_CHANNELS = 960
_WORDS = 4
_REHEARSED = {"image": (24, 24), "video": (4, 12, 12)}


def reason_uncountable(reducer: Reducer) -> str:
    """Why the kept count does not follow from budget and layout; empty if it does."""
    if isinstance(reducer, GroupWise):
        return reason_uncountable(reducer.inner)
    if isinstance(reducer, Chain):
        first, *rest = reducer.reducers
        reasons = [reason_uncountable(first), *map(_reason_uncountable_later, rest)]
        return next(filter(None, reasons), "")
    if any(True for _ in reducer.inner_reducers()):
        return f"what {reducer.name} keeps is known only once it has run"
    if reducer.count_class == "adaptive":
        return f"how many tokens {reducer.name} keeps depends on the picture"
    if reducer.count_class == "layout" and reducer.record.needs_weights:
        return f"how many tokens {reducer.name} keeps depends on its weights"
    return ""


def _reason_uncountable_later(reducer: Reducer) -> str:
    """The same of a reducer that sees what another one left, wherever that lies."""
    if isinstance(reducer, Chain):
        return next(filter(None, map(_reason_uncountable_later, reducer.reducers)), "")
    by_place = reducer.record.needs_grid or any(True for _ in reducer.inner_reducers())
    if by_place or reducer.count_class != "exact":
        return (
            f"how many tokens {reducer.name} keeps depends on which ones the strategy before kept"
        )
    return ""


def kept_tokens(reducer: Reducer, tokens: int | Layout) -> int:
    """How many tokens of an item stay, protected ones included.

    Args:
        reducer: one with countable results.
        tokens: how many unprotected tokens the item has, or where its tokens lie.

    Raises:
        ServingError: if where they lie matters, and only their number is given.
        TokenReduceError: that reducing such an item would raise: a budget too small for its
            frames, or a strategy for full grids on one that is none.
    """
    if not isinstance(tokens, Layout):
        return _kept(reducer, tokens, None)
    free = tokens.select(tokens.free) if tokens.protected_count else tokens
    return _kept(reducer, len(free), free) + tokens.protected_count


def _kept(reducer: Reducer, tokens: int, layout: Layout | None) -> int:
    """The same for unprotected tokens, of a layout that may not be known."""
    if reducer.reason_to_keep_all(tokens):
        return tokens
    if isinstance(reducer, Chain):
        first, *rest = reducer.reducers
        tokens = _kept(first, tokens, layout)
        for each in rest:
            tokens = _kept(each, tokens, None)
        return tokens
    groups = isinstance(reducer, GroupWise)
    if not groups and reducer.count_class == "exact" and not reducer.record.needs_grid:
        return reducer.count(tokens)
    if layout is None:
        raise ServingError(
            f"{reducer.name}: how many of {tokens} tokens stay depends on their frames, rows and "
            "columns, which this model's processor does not tell."
        )
    if isinstance(reducer, GroupWise):
        parts = reducer.groups(layout)
        inner = reducer.reducers_of([len(part) for part in parts])
        return sum(
            _kept(each, len(part), layout.select(part))
            for each, part in zip(inner, parts, strict=True)
        )
    if reducer.record.needs_grid:
        VisualTokens(torch.empty(1, tokens, 0), layout).require_grid(reducer.name)
    if reducer.count_class == "exact":
        return reducer.count(tokens)
    return _tried(reducer, *layout.key)


@lru_cache(maxsize=1024)
def _tried(reducer: Reducer, tokens: int, coords: bytes, protected: bytes) -> int:
    """What the strategy keeps of stand-ins: by its class the same as of any features."""
    layout = Layout(
        torch.frombuffer(bytearray(coords), dtype=torch.long).view(tokens, 4),
        torch.frombuffer(bytearray(protected), dtype=torch.bool),
    )
    return reducer(_stand_ins(reducer, layout, _CHANNELS)).kept


@lru_cache(maxsize=256)
def rehearse(reducer: Reducer, channels: int, modality: str) -> None:
    """Reduce stand-ins as wide as a model's tokens, before a picture does.

    Args:
        reducer: one with countable results.
        channels: of the LLM's embeddings.
        modality: ``image`` or ``video``.

    Raises:
        ServingError: if options or weights of the strategy do not suit that width.
    """
    layout = Layout.from_grid(_REHEARSED[modality])
    try:
        kept_tokens(reducer, layout)
    except TokenReduceError:
        # Items of this shape are refused one by one; those that come may have others.
        return
    try:
        reducer.prepare(torch.device("cpu"), torch.float32)
        reducer(_stand_ins(reducer, layout, channels))
    except TokenReduceError as error:
        raise ServingError(
            f"{reducer.name} cannot reduce tokens of {channels} channels, as this model's are "
            f"({modality}): {error}"
        ) from error


def _stand_ins(reducer: Reducer, layout: Layout, channels: int) -> VisualTokens:
    """Random tokens with the signals that a strategy reads."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = installed().signals
    sizes = {"batch": 1, "tokens": len(layout), "channels": channels}
    signals = {
        name: torch.rand(
            [sizes.get(axis, _WORDS) for axis in vocabulary[name].dims], generator=generator
        )
        for name in reducer.needs
    }
    features = torch.rand(1, len(layout), channels, generator=generator)
    return VisualTokens(features, layout, signals=signals)
