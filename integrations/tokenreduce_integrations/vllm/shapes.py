"""Where the tokens of an item lie, told by vLLM's processor to its workers.

The processor knows how many rows, columns, frames and tiles an item will have before anything is
encoded. It states them as a few numbers; the worker makes the layout of them that strategies see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from tokenreduce.tokens import Layout

#: Where a block has newlines: nowhere, after each row, or one after its last token.
Newlines = Literal["", "rows", "end"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A picture, tile or clip in raster order.

    Attributes:
        rows: in tokens.
        columns: in tokens, newlines not counted.
        frames: one for pictures.
        newlines: where it has newlines.
        whole: whether it shows the whole picture.
    """

    rows: int
    columns: int
    frames: int = 1
    newlines: Newlines = ""
    whole: bool = True

    def __len__(self) -> int:
        breaks = {"": 0, "rows": self.frames * self.rows, "end": 1}[self.newlines]
        return self.frames * self.rows * self.columns + breaks


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The blocks of an item, in the order of its tokens.

    Attributes:
        blocks: at least one.
        class_token: whether a class token comes before them.
        apart: whether each block is reduced by itself, since the prompt has text between them.
    """

    blocks: tuple[Block, ...]
    class_token: bool = False
    apart: bool = False

    @classmethod
    def grid(cls, frames: int, rows: int, columns: int) -> Shape:
        """A picture or clip without anything between its tokens."""
        return cls(blocks=(Block(rows=rows, columns=columns, frames=frames),))

    @classmethod
    def line(cls, tokens: int) -> Shape:
        """Tokens of which nothing but their number is known."""
        return cls(blocks=(Block(rows=1, columns=tokens, whole=False),))

    def __len__(self) -> int:
        return sum(map(len, self.blocks)) + self.class_token

    @property
    def layout(self) -> Layout:
        """The tokens as strategies see them; class tokens and newlines are protected."""
        return _layout(self)

    @property
    def parts(self) -> tuple[Shape, ...]:
        """What is reduced by itself: the shape, or each block of it."""
        return tuple(Shape(blocks=(block,)) for block in self.blocks) if self.apart else (self,)

    def to_list(self) -> list[object]:
        """Plain data, for :meth:`from_list`."""
        fields = [[b.frames, b.rows, b.columns, b.newlines, b.whole] for b in self.blocks]
        return [self.class_token, self.apart, fields]

    @classmethod
    def from_list(cls, data: Sequence[object]) -> Shape:
        """What :meth:`to_list` gave."""
        class_token, apart, fields = data
        return cls(
            blocks=tuple(
                Block(frames=frames, rows=rows, columns=columns, newlines=newlines, whole=whole)
                for frames, rows, columns, newlines, whole in fields  # type: ignore[attr-defined]
            ),
            class_token=bool(class_token),
            apart=bool(apart),
        )


@lru_cache(maxsize=1024)
def _layout(shape: Shape) -> Layout:
    coords, guarded = [], []
    if shape.class_token:
        coords.append(torch.zeros(1, 4, dtype=torch.long))
        guarded.append(torch.ones(1, dtype=torch.bool))
    for number, block in enumerate(shape.blocks):
        columns = block.columns + (block.newlines == "rows")
        cells = Layout.from_grid((block.frames, block.rows, columns), block=number).coords
        breaks = cells[:, 3] == block.columns
        if block.newlines == "end":
            end = cells[-1:] + torch.tensor([[0, 0, 0, 1]])
            cells = torch.cat([cells, end])
            breaks = torch.arange(len(cells)) == len(cells) - 1
        coords.append(cells)
        guarded.append(breaks)
    extents = {n: (b.rows, b.columns) for n, b in enumerate(shape.blocks) if b.whole}
    return Layout(torch.cat(coords), torch.cat(guarded), extents=extents)
