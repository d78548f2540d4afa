"""Regions of pictures that the user protects, such as lines of text for OCR."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from numbers import Rational, Real
from typing import NamedTuple

from tokenreduce.errors import TokensError


class Region(NamedTuple):
    """A box (x0, y0, x1, y1) relative to the picture: (0, 0) is its upper left corner, (1, 1) its
    lower right one."""

    x0: Fraction
    y0: Fraction
    x1: Fraction
    y1: Fraction


def as_region(box: object) -> Region:
    """Read a box as the decimals that the user typed: 0.1 is one tenth.

    Raises:
        TokensError: if it is no box inside the picture.
    """
    if isinstance(box, Region):
        return box
    if not _is_box(box):
        raise TokensError(f"a region is a box (x0, y0, x1, y1), got {box!r}.")
    try:
        region = Region(*(_as_fraction(side) for side in box))  # type: ignore[attr-defined]
    except ValueError:
        raise TokensError(f"region {box!r}: coordinates must be finite.") from None
    if not (0 <= region.x0 < region.x1 <= 1 and 0 <= region.y0 < region.y1 <= 1):
        raise TokensError(
            f"region {box!r} must have 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1: it is relative to "
            "the picture. Divide pixels by the picture's width and height."
        )
    return region


class Regions:
    """Which regions hold for which visual item of a call.

    Args:
        given: boxes that hold for every item; or a list of boxes for each item, in the order of
            the attachment's ``reductions``.

    Raises:
        TokensError: if it is neither.
    """

    def __init__(self, given: object = ()) -> None:
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TokensError(f"protect takes a list of boxes (x0, y0, x1, y1), got {given!r}.")
        lists = [part for part in given if isinstance(part, Sequence) and not _is_box(part)]
        self._each = len(lists) == len(given) and len(given) > 0
        boxes = given if self._each else [given]
        self._boxes = tuple(tuple(as_region(box) for box in item) for item in boxes)

    def __bool__(self) -> bool:
        return any(self._boxes)

    def of(self, items: int) -> tuple[tuple[Region, ...], ...]:
        """The regions of each of ``items`` visual items.

        Raises:
            TokensError: if regions were given for another number of items.
        """
        if not self._each:
            return self._boxes * items
        if len(self._boxes) != items:
            raise TokensError(
                f"protect holds lists of regions for {len(self._boxes)} visual items, this call "
                f"has {items}. Give one list for each image and clip, or boxes that hold for all."
            )
        return self._boxes


def _is_box(box: object) -> bool:
    return (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(isinstance(side, Real) and not isinstance(side, bool) for side in box)
    )


def _as_fraction(side: Real) -> Fraction:
    if isinstance(side, Rational):
        return Fraction(int(side.numerator), int(side.denominator))
    return Fraction(repr(float(side)))
