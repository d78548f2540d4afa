"""Keeps attended tokens of a middle layer, their neighbours, and those of a deep one.

Idea: the middle layers of a vision encoder attend to objects, the deep ones to tokens that gather
what the whole image says. Keep the first (anchors) with what surrounds them (buffers, since maps of
attention are noisy), and spend most of the budget on the second (registers).

Algorithm, with a budget of k:
    1. anchors: the round(``alpha`` k / 5) tokens of largest attention in the middle layer;
    2. buffers: the tokens above, below, left and right of them;
    3. registers: of the other tokens, those that receive most attention in the deep layer, until k
       are chosen. Should anchors and buffers be more than k, anchors come first, and of either
       those that receive most attention in the deep layer.

Shapes: attention ``(B, N)`` of both layers, tokens on a (T, H, W) grid -> kept ``(B, k, D)``.
Cost: O(N log N); the features are not read.

Deviations from the official code: the middle layer is a signal of the user's choice. The official
code takes the attention that tokens receive in layer 9 of CLIP's 24; no signal of TokenReduce's
vocabulary is that, and the nearest is the class attention a quarter of the way up, which lies in
what the paper calls the middle (layers 5 to 9). Neighbours end where the image does; the official
code counts along the flattened image, around the ends of rows and onto the first and the last token
(``official=True``). A budget too small for anchors and buffers is met, where the official code
fails. Batches do not share one budget. Picks equal those of the official code on recorded cases.

Published: LLaVA-1.5-7B, average of 9 benchmarks, full model 64.9: 61.9 with 128 tokens, 57.9 with
64 (table of the EADP paper). Qwen2.5-VL-7B, in percent of the full model with 25 / 10 % of the
tokens: 87.80 / 72.22 (table of AngelSlim's documentation).

```bibtex
@article{liu2025hiprune,
  title={{HiPrune}: Training-Free Visual Token Pruning via Hierarchical Attention in
         Vision-Language Models},
  author={Liu, Jizhihui and Du, Feiyi and Zhu, Guangdao and Lian, Niu and Li, Jun and Chen, Bin},
  journal={arXiv preprint arXiv:2508.00553},
  year={2025}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce import Selector, VisualTokens
from tokenreduce.errors import PipelineError

#: An anchor and its four neighbours.
CROSS = 5


@dataclass(frozen=True, kw_only=True)
class HiPrune(Selector):
    """Keeps anchors, buffers and registers.

    Args:
        alpha: share of the budget that anchors and buffers may take, in [0, 1].
        objects: the signal of the middle layer, one value for each token.
        official: count neighbours along the flattened image, as the official code does.

    Raises:
        PipelineError: if ``alpha`` is out of range.
    """

    alpha: float = 0.1
    objects: str = "shallow_class_attention"
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PipelineError(f"{self.name}: alpha={self.alpha} must lie in [0, 1].")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("received_attention", self.objects)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        grid = tokens.require_grid(self.name)
        middle = tokens.signal(self.objects).detach().float()
        deep = tokens.signal("received_attention").detach().float()
        anchors = torch.zeros_like(middle, dtype=torch.bool)
        count = min(round(k * self.alpha / CROSS), tokens.count)
        anchors.scatter_(1, _descending(middle)[:, :count], True)
        buffers = flat_neighbours(anchors, grid) if self.official else neighbours(anchors, grid)
        # Two stable sorts, the less important one first.
        order = _descending(deep)
        rank = (buffers.long() + 2 * anchors.long()).gather(1, order)
        return order.gather(1, _descending(rank))[:, :k]


def neighbours(chosen: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """``(B, N)`` tokens above, below, left or right of a chosen one, in its frame."""
    frames = torch.nn.functional.pad(chosen.unflatten(1, grid), (1, 1, 1, 1))
    beside = frames[..., 1:-1, 2:] | frames[..., 1:-1, :-2]
    return (beside | frames[..., 2:, 1:-1] | frames[..., :-2, 1:-1]).flatten(1)


def flat_neighbours(chosen: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """``(B, N)`` tokens one place or one row before or after a chosen one, cut off at the ends."""
    count, width = chosen.shape[1], grid[2]
    place = torch.arange(count, device=chosen.device)
    found = torch.zeros_like(chosen)
    for step in (-1, 1, -width, width):
        target = (place + step).clamp(0, count - 1).expand_as(chosen)
        found |= (
            torch.zeros_like(chosen, dtype=torch.int8)
            .scatter_add(1, target, chosen.to(torch.int8))
            .bool()
        )
    return found


def _descending(values: Tensor) -> Tensor:
    """Indices of ``(B, N)`` values, the largest first; of equal ones the first comes first."""
    return values.sort(dim=1, descending=True, stable=True).indices
