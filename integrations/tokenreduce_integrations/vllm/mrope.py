"""Rotary positions in time, height and width (M-RoPE) of prompts whose visual items are reduced.

Every token keeps the position that it has in the prompt before reduction. Which visual tokens stay
is known only once they are encoded, so positions come in two steps:

1. When a request arrives, the prompt is written out as it would be without reduction, the model
   numbers it, and text keeps what it got. Tokens of an item wait at its *base*, the position of its
   first token.
2. When an item is encoded, each of its rows carries its position relative to the base as some more
   channels; they are taken off and added before the LLM runs.

Text is final in the first step, so a prompt whose media lie in the prefix cache needs no second.
Numbers travel as digits to the base of 256, which every floating-point type of a model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_BASE: Final = 256
_DIGITS: Final = 3
#: Time, height, width, and where the text behind the item goes on.
_VALUES: Final = 4
#: Channels that rows of visual items carry beside their features.
CHANNELS: Final = _DIGITS * _VALUES


@dataclass(frozen=True, kw_only=True)
class Span:
    """A visual item in a prompt.

    Attributes:
        offset: its first column in the reduced prompt.
        kept: columns that it has there.
        full: columns that it has in the prompt before reduction.
    """

    offset: int
    kept: int
    full: int


def written_out(spans: Sequence[Span]) -> list[int]:
    """The first column of each item in the prompt before reduction.

    Args:
        spans: in the order of the prompt.
    """
    starts, grown = [], 0
    for span in spans:
        starts.append(span.offset + grown)
        grown += span.full - span.kept
    return starts


def waiting_positions(positions: Tensor, spans: Sequence[Span], length: int) -> Tensor:
    """``(3, length)`` positions of a reduced prompt before its items are encoded.

    Args:
        positions: ``(3, L)`` of the prompt before reduction.
        spans: the items, in the order of the prompt.
        length: of the reduced prompt.
    """
    columns, text = [], 0
    grown = 0
    for span, start in zip(spans, written_out(spans), strict=True):
        columns.append(torch.arange(text + grown, start))
        columns.append(torch.full((span.kept,), start))
        text, grown = span.offset + span.kept, start + span.full - span.offset - span.kept
    columns.append(torch.arange(text + grown, length + grown))
    return positions[:, torch.cat(columns)].contiguous()


def with_positions(features: Tensor, relative: Tensor, extent: int) -> Tensor:
    """``(M, D + CHANNELS)`` features that carry where they stand.

    Args:
        features: ``(M, D)``.
        relative: ``(M, 3)`` positions relative to the base of their item.
        extent: position at which the text behind the item goes on, relative to the base.
    """
    values = torch.cat([relative, relative.new_full((len(relative), 1), extent)], dim=1)
    digits = torch.stack([values // _BASE**power for power in range(_DIGITS)], dim=-1) % _BASE
    return torch.cat([features, digits.flatten(1).to(features)], dim=1)


def without_positions(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(M, D)`` features and ``(M, 4)`` what :func:`with_positions` wrote beside them."""
    digits = rows[:, -CHANNELS:].float().round().long().unflatten(1, (_VALUES, _DIGITS))
    weights = torch.tensor([_BASE**power for power in range(_DIGITS)], device=rows.device)
    return rows[:, :-CHANNELS], (digits * weights).sum(-1)


def settled_positions(
    positions: Tensor, waiting: Tensor, columns: Tensor, relative: Tensor
) -> Tensor:
    """``(3, S)`` positions with those of encoded rows in their place.

    Args:
        positions: ``(3, S)`` as they are; earlier parts of the prompt may be settled.
        waiting: ``(3, S)`` with every item at its base.
        columns: ``(M,)`` of the rows.
        relative: ``(M, 3)`` their positions relative to the base.
    """
    settled = positions.clone()
    settled[:, columns] = (waiting[:, columns] + relative.T.to(waiting)).to(settled)
    return settled
