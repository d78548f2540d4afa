"""Pyramids of a frame: blocks of 2 x 2 cells become one, level by level; and quadtrees cut of them.

Where a side is odd, its first row or column pairs with none.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


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


class Cells(NamedTuple):
    """The cells that a clip is cut into, n of them, by frame and first token.

    Attributes:
        features: ``(n, D)``.
        first: ``(n,)`` first token.
        cell: ``(N,)`` the cell of each token.
        share: ``(N,)`` the weight of each token in its cell.
    """

    features: Tensor
    first: Tensor
    cell: Tensor
    share: Tensor


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


def cut(
    clip: Tensor,
    levels: list[Level],
    threshold: float,
    k: int | None = None,
    *,
    by_area: bool = False,
) -> Cells:
    """Cut each frame into cells, coarse ones where they resemble their parts.

    From the coarsest level down, a cell is split if the cosine between it and one of its four parts
    lies below the threshold; a cell of fewer parts is compared with the first cell of the finer
    level for each missing one. Asked for k cells, those that resemble their parts least are split
    on, as the threshold falls.

    Args:
        clip: ``(T, P, D)`` float32.
        levels: from the tokens up to the level to start from.
        threshold: cosine that a cell must have with its parts not to be split.
        k: how many cells there must be at least, or just so many in a single frame.
        by_area: whether a cell is the sum of its tokens, not the mean of its parts.
    """
    features, unlike = [clip], []
    for level in levels[1:]:
        parts = torch.bincount(level.parent)
        shape = (len(clip), len(parts), clip.shape[2])
        pooled = clip.new_zeros(shape).index_add_(1, level.parent, features[-1])
        if not by_area:
            pooled /= parts[:, None]
        unlike.append(_least_cosine(pooled, features[-1], level.parent, parts))
        features.append(pooled)
    splits = _splits(levels, unlike, threshold, k, len(clip))
    depth = torch.zeros(clip.shape[:2], dtype=torch.long, device=clip.device)
    whole = torch.ones_like(depth, dtype=torch.bool)
    for height in range(len(levels) - 1, 0, -1):
        stays = whole & ~splits[height - 1][:, levels[height].cell]
        depth[stays] = height
        whole &= ~stays
    first = torch.stack([level.first[level.cell] for level in levels])
    at = torch.arange(clip.shape[1], device=clip.device)
    start = torch.arange(len(clip), device=clip.device)[:, None] * clip.shape[1]
    heads, cell = (first[depth, at] + start).unique(return_inverse=True)
    share = torch.stack([level.share for level in levels])[depth, at]
    chosen = depth.flatten()[heads]
    outputs = clip.new_empty(len(heads), clip.shape[2])
    for height, (level, pooled) in enumerate(zip(levels, features, strict=True)):
        mine = chosen == height
        frame, token = heads[mine] // clip.shape[1], heads[mine] % clip.shape[1]
        outputs[mine] = pooled[frame, level.cell[token]]
    return Cells(outputs, heads, cell.flatten(), share.flatten())


def _least_cosine(pooled: Tensor, finer: Tensor, parent: Tensor, parts: Tensor) -> Tensor:
    """``(T, h w)`` the lowest cosine of each cell with its four parts."""
    # Frame by frame: the cells spread over their parts are as large as these.
    cosine = torch.stack(
        [
            cosine_similarity(cells[parent], own, dim=1)
            for cells, own in zip(pooled, finer, strict=True)
        ]
    )
    least = torch.full_like(pooled[..., 0], torch.inf)
    least = least.scatter_reduce(1, parent.expand_as(cosine), cosine, "amin")
    with_first = cosine_similarity(pooled, finer[:, :1], dim=2)
    return torch.where(parts < 4, torch.minimum(least, with_first), least)


def _splits(
    levels: list[Level], least: list[Tensor], threshold: float, k: int | None, frames: int
) -> list[Tensor]:
    """Which cells of the levels above the tokens are split, each ``(T, h w)``."""
    if k is None or not least:
        # Whether a cell is reached at all is seen from above.
        return [cosine < threshold for cosine in least]
    # A cell is reached once those above it are split: it can be no earlier than they.
    turns = [least[-1]]
    for level, cosine in zip(levels[:0:-1], least[-2::-1], strict=False):
        turns.append(torch.maximum(cosine, turns[-1][:, level.parent]))
    gains = [(torch.bincount(level.parent) - 1).expand(frames, -1) for level in levels[:0:-1]]
    turn = torch.cat([each.flatten() for each in turns])
    order = turn.argsort(stable=True)
    cells = gains[0].numel() + torch.cat([each.flatten() for each in gains])[order].cumsum(0)
    needed = int((cells < k).sum()) + 1 if gains[0].numel() < k else 0
    wanted = needed if frames == 1 else max(needed, int((turn < threshold).sum()))
    split = torch.zeros_like(turn, dtype=torch.bool)
    split[order[:wanted]] = True
    sizes = [each.numel() for each in turns]
    parts = [part.reshape(frames, -1) for part in split.split(sizes)]
    return parts[::-1]
