"""Tensor primitives that several strategies share. Each has a slow oracle in the tests.

Everything is batched over the leading axis, deterministic by content, and accumulates in float32
under half precision.
"""

from tokenreduce.ops.gathering import gather_tokens
from tokenreduce.ops.hashing import content_seed, counter_uniform
from tokenreduce.ops.matching import (
    BipartiteMatch,
    SoftMatching,
    bipartite_match,
    bipartite_soft_matching,
)
from tokenreduce.ops.merging import MergeWeights, compose, group_weights, merge_tokens
from tokenreduce.ops.pooling import (
    AxisMap,
    GridMap,
    average_axis,
    bilinear_axis,
    grid_map,
    pooled_grid,
)
from tokenreduce.ops.selection import TIE_TOLERANCE, first_argmax, top_k_indices, top_k_mask
from tokenreduce.ops.similarity import gram_matrix, unit_vectors
from tokenreduce.ops.spreading import farthest_first

__all__ = [
    "TIE_TOLERANCE",
    "AxisMap",
    "BipartiteMatch",
    "GridMap",
    "MergeWeights",
    "SoftMatching",
    "average_axis",
    "bilinear_axis",
    "bipartite_match",
    "bipartite_soft_matching",
    "compose",
    "content_seed",
    "counter_uniform",
    "farthest_first",
    "first_argmax",
    "gather_tokens",
    "gram_matrix",
    "grid_map",
    "group_weights",
    "merge_tokens",
    "pooled_grid",
    "top_k_indices",
    "top_k_mask",
    "unit_vectors",
]
