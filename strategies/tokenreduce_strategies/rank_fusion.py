"""Keeps the tokens that rank high by two scores at once.

Idea: two judges see different things in an image: the vision encoder what stands out, the language
side what it can use. Average their opinions; ranks, not values, since their scales differ.

Algorithm, with two scores a and b for each token:
    1. r_i = number of tokens of larger a than token i, and q_i likewise by b;
    2. keep the k tokens of smallest ``balance`` r_i + (1 - ``balance``) q_i.

Shapes: scores ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N log N); the features are not read.

LLaVA-Meteor selects tokens so, by a visual and a native expert; its experts are trained and there
is no official code. This is the selection alone, over two signals that the user names; with the
default ones it is no published method. Scores within 2.5e-7 of each other, relative to the largest,
share a rank; ties go to the lowest index.

Published: LLaVA-Meteor, with trained experts, 75 to 95 percent fewer tokens at comparable results
over 12 benchmarks (its abstract). Not to be expected of given signals.

```bibtex
@article{li2025llavameteor,
  title={Top-Down Compression: Revisit Efficient Vision Token Projection for Visual Instruction
         Tuning},
  author={Li, Bonan and Zhang, Zicheng and Liu, Songhua and Yu, Weihao and Wang, Xinchao},
  journal={arXiv preprint arXiv:2505.11945},
  year={2025}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import TIE_TOLERANCE
from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class RankFusion(Scorer):
    """Keeps the tokens of best average rank by two signals.

    Args:
        scores: the two signals, one value for each token.
        balance: weight of the first, in [0, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    scores: tuple[str, ...] = ("class_attention", "received_attention")
    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scores) != 2:
            raise PipelineError(f"{self.name}: scores={self.scores} must name two signals.")
        if not 0 <= self.balance <= 1:
            raise PipelineError(f"{self.name}: balance={self.balance} must lie in [0, 1].")

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.scores))

    def score(self, tokens: VisualTokens) -> Tensor:
        first, second = (self._ranks(tokens, name) for name in self.scores)
        return -(self.balance * first + (1 - self.balance) * second)

    def _ranks(self, tokens: VisualTokens, name: str) -> Tensor:
        """``(B, N)`` how many tokens have a larger score."""
        score = tokens.signal(name).detach().float()
        if score.ndim != 2:
            raise PipelineError(
                f"{self.name}: {name!r} has shape {tuple(score.shape)}; a score is one value for "
                "each token."
            )
        score = score.contiguous()
        tolerance = TIE_TOLERANCE * score.abs().amax(1, keepdim=True)
        ascending = score.sort(dim=1).values
        below = torch.searchsorted(ascending, score + tolerance, right=True)
        return (score.shape[1] - below).float()
