"""Averages neighbouring tokens: adaptive average pooling, the control of every merger.

Algorithm:
    1. choose the grid to pool to: the most tokens within the budget whose cells are at most twice
       as long as wide (:func:`tokenreduce.ops.pooled_grid`);
    2. average each frame's h' x w' windows; output i of an axis averages the places from
       floor(i n / m) up to ceil((i + 1) n / m), so windows overlap where m does not divide n;
    3. with fewer tokens than frames, average runs of neighbouring frames to one token each.

The kept count follows from budget and grid and may lie below the budget, never above it. Each
output stands at the token in the middle of its cell. Tokens count alike, whatever their size.

Shapes: features ``(B, T H W, D)`` -> merged ``(B, T' h' w', D)``. Cost: O(N D).
Official code: none; a control. No citation.
"""

from dataclasses import dataclass

from tokenreduce.ops import AxisMap, MergeWeights, average_axis, grid_map, merge_tokens, pooled_grid
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class AvgPool(Reducer):
    """Averages neighbouring tokens of a full grid."""

    def axis_map(self, n: int, m: int) -> AxisMap:
        """How ``n`` rows or columns become ``m``."""
        return average_axis(n, m)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Pool the grid.

        Raises:
            TokensError: if the tokens do not form a full grid.
        """
        grid = tokens.require_grid(self.name)
        frames, *sides = zip(grid, pooled_grid(grid, self.count(tokens.count)), strict=True)
        # Frames are averaged, however a frame is pooled: sampling them would lose whole frames.
        pooled = grid_map(average_axis(*frames), *(self.axis_map(*side) for side in sides))
        device = tokens.features.device
        weights = MergeWeights(
            *(edge.to(device).expand(tokens.batch, -1) for edge in pooled.weights)
        )
        return Reduction(
            features=merge_tokens(tokens.features, weights, len(pooled.positions)),
            positions=pooled.positions.to(device).repeat(tokens.batch, 1),
            assignment=pooled.assignment.to(device).repeat(tokens.batch, 1),
            weights=weights,
        )
