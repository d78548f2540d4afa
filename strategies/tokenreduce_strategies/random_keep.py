"""Keeps random tokens: the control that every strategy must beat.

Algorithm:
    1. hash the coarse content of the item's features, and ``seed``, into a seed;
    2. draw one uniform number for each token with a counter-based generator;
    3. keep the k tokens of largest number, in source order.

The same content keeps the same tokens, alone or in a batch, in any order of calls, and a larger
budget keeps a superset. The global random state is neither read nor advanced.

Shapes: features ``(B, N, D)`` -> scores ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N D).
Official code: none; a control. No citation.
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import content_seed, counter_uniform
from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class RandomKeep(Scorer):
    """Keeps random tokens, seeded by content.

    Args:
        seed: another seed, another draw; from 0 up to, excluding, 2**62.

    Raises:
        PipelineError: if the seed is out of range.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 1 << 62:
            raise PipelineError(f"{self.name}: seed={self.seed} must lie in [0, 2**62).")

    def score(self, tokens: VisualTokens) -> Tensor:
        return counter_uniform(content_seed(tokens.features.detach()) + self.seed, tokens.count)
