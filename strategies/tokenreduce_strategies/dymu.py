"""DyMU's dynamic merging: bipartite matching, as many pairs as exceed a similarity.

Idea: a simple image should become fewer tokens than a crowded one. Do not merge a fixed number of
pairs but all that are more similar than a threshold, which a calibration set gives.

Algorithm, with keys c (the features, where the tokens carry no keys):
    1. split the tokens by position into sources (even) and targets (odd); the partner of a source
       is the target of largest cosine;
    2. merge the sources whose cosine exceeds ``threshold`` into their partners, by size-weighted
       means; outputs stand at the targets and at the sources that stay.
With a budget of k, the N - k most similar pairs are merged instead, in as many rounds as it takes.
:func:`calibrated_threshold` finds the threshold at which a batch of images loses a given number of
tokens on average; simple images then lose more.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)`` -> merged ``(B, k, D)``. Cost: O(N^2 C / 4).

Deviations from the official code: it merges in every block of the encoder with a threshold each;
this is one such step, at any site. Virtual unmerging, which gives every merged token as many places
in the LLM as it stands for, is no part of it. Cosines within 2.5e-7 above the threshold do not
exceed it. Groups equal those of the official code on recorded cases, in both of its forms; the
batch form divides by the size plus 1e-4, and the form for one image merges at most N // 2 tokens of
an odd number.

Published: 32 to 85 percent fewer tokens at comparable accuracy (its abstract).

```bibtex
@article{wang2025dymu,
  title={{DyMU}: Dynamic Merging and Virtual Unmerging for Efficient {VLMs}},
  author={Wang, Zhenhailong and Purushwalkam, Senthil and Xiong, Caiming and Savarese, Silvio and
          Ji, Heng and Xu, Ran},
  journal={arXiv preprint arXiv:2504.17040},
  year={2025}
}
```
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError
from tokenreduce.ops import TIE_TOLERANCE, bipartite_match
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.reducer import Grouping, Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.tome import compared, merge_rounds


def calibrated_threshold(keys: Tensor, merges: int) -> float:
    """The threshold at which items lose ``merges`` tokens each on average, never below 0.

    Args:
        keys: ``(B, N, C)``.
        merges: fewer than half of N.
    """
    similarity = bipartite_match(keys).similarity.flatten()
    ranked = similarity.sort(descending=True).values
    return max(0.0, float(ranked[merges * keys.shape[0]]))


def threshold_groups(keys: Tensor, threshold: float) -> Tensor:
    """``(B, N)`` the token that each one merges into, itself if it stays; from keys."""
    match = bipartite_match(keys)
    goes = torch.arange(keys.shape[1], device=keys.device).repeat(keys.shape[0], 1)
    merged = match.similarity > threshold + TIE_TOLERANCE
    goes[:, ::2] = torch.where(merged, match.partner, goes[:, ::2])
    return goes


@dataclass(frozen=True, kw_only=True)
class DyMU(Reducer):
    """Merges the pairs of a bipartite matching that are more similar than a threshold.

    Args:
        threshold: cosine above which a pair is merged, in [-1, 1]; read without a budget.

    Raises:
        PipelineError: if ``threshold`` is out of range.
    """

    adaptive: ClassVar[bool] = True

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.threshold <= 1:
            raise PipelineError(f"{self.name}: threshold={self.threshold} is a cosine, in [-1, 1].")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.budget is None else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        keys = compared(tokens)
        if self.budget is not None:
            k = self.count(tokens.count)
            grouping = Grouping(*merge_rounds(keys, tokens.sizes, k))
        elif tokens.count == 1:
            return Reduction.identity(tokens, reason="a single token has no partner")
        else:
            goes = threshold_groups(keys, self.threshold)
            own = torch.arange(tokens.count, device=goes.device)
            positions = kept_indices(goes == own)
            k = positions.shape[1]
            grouping = Grouping(torch.searchsorted(positions, goes), positions)
        return Reduction.from_groups(tokens, grouping.groups, k, positions=grouping.positions)
