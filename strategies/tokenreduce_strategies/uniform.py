"""Keeps evenly spaced tokens: the control that knows nothing but geometry.

Algorithm:
    1. on a full (t, y, x) grid: keep the tokens at the cell centres of the grid that ``avg-pool``
       would pool to, which holds at most k cells of about the source's shape;
    2. keep as many more as the budget still allows, at even strides over the order of the rest;
    3. without a grid (tiles, Q-Former tokens, leftovers of an earlier stage): step 2 alone.

A plain stride over raster order would put a budget of one token a row into a single column.

Shapes: features ``(B, N, D)`` -> indices ``(k,)``, the same for every item -> kept ``(B, k, D)``.
Cost: O(N). Official code: none; a control. No citation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.ops import average_axis, grid_map, pooled_grid
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Uniform(Selector):
    """Keeps evenly spaced tokens, whatever they hold."""

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        kept = torch.zeros(tokens.count, dtype=torch.bool)
        if tokens.grid is not None:
            axes = zip(tokens.grid, pooled_grid(tokens.grid, k), strict=True)
            kept[grid_map(*(average_axis(n, m) for n, m in axes)).positions] = True
        rest = (~kept).nonzero().squeeze(1)
        kept[rest[_even_stride(len(rest), k - int(kept.sum()))]] = True
        return kept.nonzero().squeeze(1).to(tokens.features.device).expand(tokens.batch, -1)


def _even_stride(n: int, k: int) -> Tensor:
    """The centres of ``k`` equal parts of ``n`` places."""
    return (2 * torch.arange(k) + 1) * n // (2 * max(k, 1))
