"""Keeps the tokens of largest norm.

Idea: an encoder often writes what it finds informative into features of large magnitude. This is
the plainest scorer there is, a baseline rather than a recommendation.

Algorithm:
    1. score every token with the L2 norm of its feature;
    2. keep the k tokens of largest score, ties to the lowest index, in source order.

Shapes: features ``(B, N, D)`` -> scores ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N D).
Official code: none; the score is folklore. No citation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class NormTopK(Scorer):
    """Keeps the tokens of largest L2 norm."""

    def score(self, tokens: VisualTokens) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(tokens.features.float(), dim=-1)
        return norms
