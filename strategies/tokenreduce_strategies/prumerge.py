"""Keeps tokens that the class token singles out and merges the others into them.

Idea: the class token attends strongly to a few patches, so outliers of its attention say both which
tokens to keep and how many. The rest is not lost: each kept token gathers its most similar tokens,
and one more token gathers everything that was not kept.

Algorithm, with class attention a and attention keys:
    1. m = number of tokens whose attention lies above Q3 + 1.5 (Q3 - Q1), the quartiles of a; with
       a budget of k, m = k - 1;
    2. keep the m tokens of largest a;
    3. each kept token i becomes x_i + sum of a_j x_j over the ``neighbours`` other tokens j whose
       keys are most similar to its own by cosine, kept ones included;
    4. one more output is the sum of a_j x_j over all tokens j that were not kept; it stands at the
       last of them.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)``, class attention ``(B, N)`` -> ``(B, m + 1, D)``.
Cost: O(m N C) for the similarities, O(m ``neighbours`` D) for the sums; memory is tiled.

Deviations from the official code: it reduces the encoder's output before the projector, here
projected features are merged; its attention is that of the layer's heads joined into one, here it
is the mean over heads, as the signal has it; a budget counts the extra output of step 4. With
``official=True`` it does not (k + 1 outputs), a share of the tokens rounds down, to none where it
is less than one token, and outliers are counted over the whole batch. Tokens and features equal
those of the official code on recorded cases.

Published: LLaVA-1.5-7B with 64 tokens, 86.3 percent of the full model (table of the ProViP paper).

```bibtex
@inproceedings{shang2025prumerge,
  title={{LLaVA-PruMerge}: Adaptive Token Reduction for Efficient Large Multimodal Models},
  author={Shang, Yuzhang and Cai, Mu and Xu, Bingxin and Lee, Yong Jae and Yan, Yan},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  eprint={2403.15388},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError
from tokenreduce.ops import MergeWeights, gather_tokens, top_k_indices, unit_vectors
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.official import stated_ratio
from tokenreduce_strategies.remainders import (
    common_count,
    keep_with_remainder,
    outlier_share,
    remainder_edges,
)

#: Entries of one tile of similarities: 16 Mi float32 values, 64 MiB.
TILE_ENTRIES = 1 << 24


def neighbour_edges(kept: Tensor, attention: Tensor, keys: Tensor, neighbours: int) -> MergeWeights:
    """Steps 3 and 4: what flows into each kept token, and into the one that stands for the rest.

    Args:
        kept: ``(B, m)`` tokens to keep; token kept[j] becomes output j, the rest output m.
        attention: ``(B, N)`` class attention.
        keys: ``(B, N, C)`` attention keys.
        neighbours: how many tokens each kept token gathers.
    """
    batch, n = attention.shape
    edges = remainder_edges(kept, attention)
    neighbours = min(neighbours, n - 1)
    unit = unit_vectors(keys)
    rows = max(1, TILE_ENTRIES // (batch * n))
    found = []
    for part in kept.split(rows, dim=1):
        cosine = gather_tokens(unit, part) @ unit.mT
        cosine.scatter_(2, part[..., None], -torch.inf)
        found.append(top_k_indices(cosine, neighbours, scale=1.0))
    source = torch.cat(found, dim=1).flatten(1)
    output = torch.arange(kept.shape[1], device=kept.device).repeat_interleave(neighbours)
    return MergeWeights(
        torch.cat([edges.output, output.expand(batch, -1)], dim=1),
        torch.cat([edges.source, source], dim=1),
        torch.cat([edges.value, attention.float().gather(1, source)], dim=1),
    )


@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Keeps outliers of the class attention, with their neighbours merged in, and one for the rest.

    Args:
        neighbours: how many tokens each kept token gathers, at least 1.
        official: as the official code counts: one output beyond the budget, outliers of the batch.

    Raises:
        PipelineError: if an option is out of range.
    """

    adaptive: ClassVar[bool] = True

    neighbours: int = 32
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise PipelineError(f"{self.name}: neighbours={self.neighbours} must be at least 1.")

    @property
    def count_class(self) -> CountClass:
        if self.budget is None:
            return "adaptive"
        return "layout" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        attention = tokens.signal("class_attention").detach().float()
        keys = tokens.signal("keys").detach()
        kept = self.choose(attention)
        if kept.shape[1] == tokens.count:
            return Reduction.identity(tokens, reason=f"{self.name} chose to keep all")
        edges = neighbour_edges(kept, attention, keys, self.neighbours)
        return keep_with_remainder(tokens, kept, edges)

    def choose(self, attention: Tensor) -> Tensor:
        """``(B, m)`` indices of the tokens to keep, from their class attention ``(B, N)``."""
        if self.budget is not None:
            return self.choose_within(attention, self._places(attention.shape[1]))
        n = attention.shape[1]
        if self.official:
            share = float(outlier_share(attention.reshape(1, -1)))
            return self.choose_freely(attention, share, int(n * share))
        counts = (outlier_share(attention) * n).round().long().clamp(min=1)
        count = common_count(counts, strategy=self.name)
        return self.choose_freely(attention, count / n, count)

    def choose_freely(self, attention: Tensor, share: float, count: int) -> Tensor:
        """The tokens to keep without a budget, when ``count`` of them are outliers."""
        return top_k_indices(attention.log(), count)

    def choose_within(self, attention: Tensor, count: int) -> Tensor:
        """``count`` tokens to keep."""
        return top_k_indices(attention.log(), count)

    def _places(self, n: int) -> int:
        """How many tokens a budget keeps beside the one that stands for the rest."""
        if not self.official:
            return self.count(n) - 1
        return min(int(stated_ratio(self, n) * n) if self.keep is None else self.keep, n - 1)
