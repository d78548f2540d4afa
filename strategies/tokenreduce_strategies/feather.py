"""Keeps what the prompt looks at regardless of its place, and an even grid beside it.

Idea: attention inside the LLM favours tokens near the prompt, that is, the bottom of the image,
because of the rotary embedding. Without it attention says what matters; and since it may miss
things in an early layer, an even grid of tokens stays as well.

Algorithm, after an early layer of the LLM:
    1. a_i = attention of the prompt's last token to visual token i, computed from queries and keys
       before the rotary embedding, averaged over heads;
    2. the tokens of every ``stride``-th row and column stay; where they are more than half of the
       budget, the smallest larger stride at which they are not;
    3. the rest of the budget goes to the other tokens of largest a_i.
A second cut, deeper, takes ``stride=0``: attention alone.

Shapes: attention ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N); the features are not read.

Deviations from the official code: the count is exact, and the grid is bounded by the budget. There
the k tokens of largest attention stay, and the grid beside them (``official=True``). Tiles and
frames have a grid each. Ties go to the lowest index. Tokens equal those of the official code on
recorded cases.

Published: RefCOCO 43.4 where FastV has 7.6 (its table).

```bibtex
@inproceedings{endo2025feather,
  title={Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model
         Acceleration},
  author={Endo, Mark and Wang, Xiaohan and Yeung-Levy, Serena},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  eprint={2412.13180},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError
from tokenreduce.ops import top_k_indices
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.remainders import official_count


@dataclass(frozen=True, kw_only=True)
class Feather(Reducer):
    """Keeps an even grid, and the tokens of largest attention without rotary embedding.

    Args:
        stride: distance of the rows and columns that stay, the least; 0 for none.
        official: keep the grid beside the budget, and shares of the tokens rounded down.

    Raises:
        PipelineError: if ``stride`` is negative.
    """

    stride: int = 3
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 0:
            raise PipelineError(f"{self.name}: stride={self.stride} must not be negative.")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        attention = tokens.signal("unrotated_attention").detach().float().log()
        if self.official:
            attended = top_k_indices(attention, official_count(self, tokens.count))
            grid = self.even_grid(tokens.coords, 2 * tokens.count).expand_as(attention)
            return Reduction.from_kept(tokens, kept_indices(grid.scatter(1, attended, True)))
        k = self.count(tokens.count)
        grid = self.even_grid(tokens.coords, k)
        even = grid.nonzero().squeeze(1).expand(tokens.batch, -1)
        others = (~grid).nonzero().squeeze(1)
        attended = others[top_k_indices(attention[:, others], k - even.shape[1])]
        return Reduction.from_kept(tokens, torch.cat([even, attended], dim=1))

    def even_grid(self, coords: Tensor, k: int) -> Tensor:
        """Step 2: ``(N,)`` booleans, from coordinates ``(N, 4)`` and the budget."""
        none = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
        if self.stride == 0:
            return none
        y, x = coords[:, 2], coords[:, 3]
        for stride in range(self.stride, int(torch.maximum(y, x).max()) + 2):
            grid = (y % stride == 0) & (x % stride == 0)
            if 2 * int(grid.sum()) <= k:
                return grid
        return none
