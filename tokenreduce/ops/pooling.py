"""Pooling of full grids as separable linear maps, with their source maps."""

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops.merging import MergeWeights

#: Cells of a pooled grid that are up to this many times longer than wide cost nothing.
HARMLESS_STRETCH = 2


class AxisMap(NamedTuple):
    """A linear map from the ``n`` places of an axis to ``m`` outputs.

    Attributes:
        weights: ``(m, n)`` float64, rows sum to one.
        owner: ``(n,)`` the output that each place chiefly flows into, -1 if into none.
        position: ``(m,)`` the place that each output stands at, ascending; it is owned.
    """

    weights: Tensor
    owner: Tensor
    position: Tensor


class GridMap(NamedTuple):
    """A linear map from the tokens of a grid to those of a smaller one, in raster order.

    Attributes:
        positions: ``(M,)`` the token that each output stands at, ascending.
        assignment: ``(N,)`` the output that each token chiefly flows into, -1 if into none.
        weights: edges, a batch of one.
    """

    positions: Tensor
    assignment: Tensor
    weights: MergeWeights


def average_axis(n: int, m: int) -> AxisMap:
    """Adaptive average pooling of ``n`` places to ``m``, 1 <= m <= n.

    Output i averages the places from floor(i n / m) up to, excluding, ceil((i + 1) n / m), so
    windows overlap by a place where m does not divide n; a place is owned by the output whose m-th
    of the axis holds its centre.
    """
    place, output = torch.arange(n), torch.arange(m)
    begin, end = output * n // m, -(-(output + 1) * n // m)
    inside = (place >= begin[:, None]) & (place < end[:, None])
    weights = inside.double() / (end - begin)[:, None]
    return AxisMap(weights, (2 * place + 1) * m // (2 * n), (2 * output + 1) * n // (2 * m))


def bilinear_axis(n: int, m: int) -> AxisMap:
    """Linear interpolation at the centres of ``m`` equal parts of ``n`` places, 1 <= m <= n.

    Without anti-aliasing: an output blends the two places around its centre, so that places
    between the samples flow into none once n > 2 m.
    """
    place = torch.arange(n, dtype=torch.float64)
    centre = (torch.arange(m, dtype=torch.float64) + 0.5) * n / m - 0.5
    weights = (1 - (centre[:, None] - place).abs()).clamp(min=0)
    strongest = weights.max(dim=0)
    owner = torch.where(strongest.values > 0, strongest.indices, -1)
    return AxisMap(weights, owner, weights.argmax(dim=1))


def grid_map(time: AxisMap, height: AxisMap, width: AxisMap) -> GridMap:
    """The product of three axis maps, over tokens in (t, y, x) raster order."""
    positions, assignment = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    output, source = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    value = torch.ones(1, dtype=torch.float64)
    for axis in (time, height, width):
        m, n = axis.weights.shape
        edge_output, edge_source = axis.weights.nonzero().unbind(1)
        positions = (positions[:, None] * n + axis.position).flatten()
        joined = assignment[:, None] * m + axis.owner
        lost = (assignment[:, None] < 0) | (axis.owner < 0)
        assignment = joined.masked_fill(lost, -1).flatten()
        output = (output[:, None] * m + edge_output).flatten()
        source = (source[:, None] * n + edge_source).flatten()
        value = (value[:, None] * axis.weights[edge_output, edge_source]).flatten()
    return GridMap(
        positions, assignment, MergeWeights(output[None], source[None], value[None].float())
    )


@lru_cache(maxsize=1024)
def pooled_grid(grid: tuple[int, int, int], k: int) -> tuple[int, int, int]:
    """The grid of at most ``k`` tokens that a (T, H, W) grid is best pooled to.

    Every frame is pooled alike, to h x w tokens with T h w <= k; with fewer tokens than frames,
    neighbouring frames are pooled too, to one token each. Of all h <= H and w <= W the most tokens
    win, as long as their cells are at most twice as long as wide (in units of source cells); the
    tokens of a grid with longer cells count less in proportion. Equal counts go to the squarest
    cells, then to the fewest rows.

    Args:
        grid: (T, H, W).
        k: the budget, at least 1.
    """
    frames, height, width = grid
    if k <= frames:
        return k, 1, 1
    each = k // frames
    choices: list[tuple[Fraction, Fraction, int, int]] = []
    for h in range(1, min(height, each) + 1):
        # Up to the harmless stretch more columns are worth more; past it, none gains anything.
        harmless = HARMLESS_STRETCH * h * width // height
        for w in {min(width, each // h, bound) for bound in (max(1, harmless), harmless + 1)}:
            stretch = Fraction(h * width, w * height)
            stretch = max(stretch, 1 / stretch)
            worth = h * w / max(Fraction(1), stretch / HARMLESS_STRETCH)
            choices.append((worth, -stretch, -h, w))
    _, _, negative_h, w = max(choices)
    return frames, -negative_h, w
