"""Folds neighbouring tokens into one: space to depth, then a learned projection.

Idea: instead of averaging a block of tokens, put their channels side by side, so that nothing is
lost, and let a trained projection bring the result back to the width of the LLM.

Algorithm, with a projection of width r^2 D to D:
    1. cut each frame into blocks of r x r tokens; where r does not divide a side, its last row or
       column is repeated;
    2. put the r^2 tokens of a block side by side, row by row: y of r^2 D channels;
    3. output W y + b, at the place of the block's first token.

It needs weights that were trained for the model, none of which are shipped: a safetensors file with
``weight`` (D, r^2 D) and, if there is one, ``bias`` (D). r follows from the width; one that fits no
r is refused, as are missing weights; ``avg-pool`` needs none. It takes no budget.

Shapes: features ``(B, T H W, D)`` -> ``(B, T h w, D)``, h = ceil(H / r). Cost: O(N D^2).

SynerGen-VL folds its image tokens so, and unfolds them again to generate images; the whole model is
trained for it, and no code of it is public that this could be compared with. Other tensors of the
tokens (DeepStack features, signals) have no such projection: they become the means of their blocks.

Published: none for this form.

```bibtex
@inproceedings{li2025synergenvl,
  title={{SynerGen-VL}: Towards Synergistic Image Understanding and Generation with Vision Experts
         and Token Folding},
  author={Li, Hao and Tian, Changyao and Shao, Jie and Zhu, Xizhou and Wang, Zhaokai and
          Zhu, Jinguo and Dou, Wenhan and Wang, Xiaogang and Li, Hongsheng and Lu, Lewei and
          Dai, Jifeng},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  eprint={2412.09604},
  archivePrefix={arXiv}
}
```
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class SpaceToDepth(Reducer):
    """Folds blocks of tokens into one, by a learned projection.

    Args:
        weights: the projection, a safetensors file.

    Raises:
        BudgetError: if it is given a budget.
    """

    adaptive: ClassVar[bool] = True

    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            raise BudgetError(
                f"{self.name}: the width of its projection says how many tokens are left, so "
                f"{self.budget} cannot be met: give no budget."
            )

    @property
    def count_class(self) -> CountClass:
        return "layout"

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Read the projection.

        Raises:
            PipelineError: if there is none.
        """
        self._projection(device, None)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Fold and project.

        Raises:
            TokensError: if the tokens do not form a full grid.
            PipelineError: if the projection does not suit the width of the tokens.
        """
        grid, width = tokens.require_grid(self.name), tokens.features.shape[2]
        projection = self._projection(tokens.features.device, width)
        folds = projection["weight"].shape[1] // width
        side = isqrt(folds)
        if folds * width != projection["weight"].shape[1] or side * side != folds:
            raise PipelineError(
                f"{self.name}: a projection of {projection['weight'].shape[1]} channels takes no "
                f"square block of tokens of {width} channels: r^2 x {width} does."
            )
        bias = projection.get("bias")
        if bias is not None and bias.shape != (width,):
            raise PipelineError(
                f"{self.name}: weights={self.weights!r} must hold a 'bias' of {width} values, got "
                f"{tuple(bias.shape)}."
            )
        blocks, groups = (part.to(tokens.features.device) for part in block_map(grid, side))
        groups = groups.expand(tokens.batch, -1)
        folded = tokens.features[:, blocks].flatten(2).float()
        made = linear(folded, projection["weight"], bias).to(tokens.features.dtype)
        return replace(Reduction.from_groups(tokens, groups, len(blocks)), features=made)

    def _projection(self, device: torch.device, width: int | None) -> Mapping[str, Tensor]:
        return load_weights(
            self.weights,
            {"weight": (width, None)},
            strategy=self.name,
            instead="avg-pool",
            device=device,
        )


def block_map(grid: tuple[int, int, int], side: int) -> tuple[Tensor, Tensor]:
    """Step 1: ``(M, r^2)`` the tokens of each block, and ``(N,)`` the block of each token."""
    frames, height, width = grid
    down, across = (
        torch.arange(-(-extent // side) * side).clamp(max=extent - 1).unflatten(0, (-1, side))
        for extent in (height, width)
    )
    token = torch.arange(frames * height * width).reshape(grid)
    blocks = token[:, down][..., across].transpose(2, 3).reshape(-1, side * side)
    rows = torch.arange(height)[:, None] // side * len(across)
    block = rows + torch.arange(width) // side
    frame = torch.arange(frames)[:, None, None] * len(down) * len(across)
    return blocks, (frame + block).flatten()
