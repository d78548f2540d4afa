"""Pyramids of a frame: blocks of 2 x 2 cells become one, level by level.

Where a side is odd, its first row or column pairs with none.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """One level of the pyramid of a frame, h x w cells.

    Attributes:
        parent: ``(h' w',)`` the cell of this level that each cell of the finer one lies in.
        cell: ``(H W,)`` the cell that each token lies in.
        share: ``(H W,)`` the weight of each token in its cell.
        first: ``(h w,)`` the first token of each cell.
    """

    parent: Tensor
    cell: Tensor
    share: Tensor
    first: Tensor


def pyramid(height: int, width: int, device: torch.device) -> list[Level]:
    """The levels of a frame, from its tokens up, until a side has no more than two cells.

    Args:
        height: of the frame, in tokens.
        width: likewise.
        device: where to put the maps.
    """
    own = torch.arange(height * width, device=device)
    levels = [Level(own, own, torch.ones(height * width, device=device), own)]
    while min(height, width) > 2:
        rows = (torch.arange(height, device=device) + height % 2) // 2
        columns = (torch.arange(width, device=device) + width % 2) // 2
        height, width = (height + 1) // 2, (width + 1) // 2
        below = levels[-1]
        parent = (rows[:, None] * width + columns).flatten()
        parts = torch.bincount(parent)
        first = torch.full_like(parts, len(own)).scatter_reduce(0, parent, below.first, "amin")
        cell = parent[below.cell]
        levels.append(Level(parent, cell, below.share / parts[cell], first))
    return levels
