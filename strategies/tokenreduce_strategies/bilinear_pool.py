"""Resizes the token grid by bilinear interpolation.

Idea: Magic-MM-Embedding shrinks the H x W feature map between encoder and connector by a factor
per side with plain bilinear interpolation; it has no parameters of its own.

Algorithm:
    1. choose the grid to resize to, as ``avg-pool`` does;
    2. output (i, j) samples the map at ((i + 1/2) H / h' - 1/2, (j + 1/2) W / w' - 1/2): a weighted
       sum of the four tokens around that point (``align_corners=False``, no anti-aliasing);
    3. with fewer tokens than frames, average runs of neighbouring frames.

At a factor of two this is 2 x 2 averaging; beyond it, tokens between the sample points are lost and
are recorded as dropped. Each output stands at the token nearest to its sample point.

Shapes: features ``(B, T H W, D)`` -> merged ``(B, T' h' w', D)``. Cost: O(M D), M outputs.

Deviations: the paper resizes before the connector and trains the model with it, so its numbers do
not carry over to a model that was not trained this way, and none are quoted here. Here projected
tokens are resized, to any budget. Not compared with official code.

```bibtex
@misc{li2026magicmmembedding,
  title={Magic-MM-Embedding: Towards Visual-Token-Efficient Universal Multimodal Embedding with
         {MLLMs}},
  author={Li, Qi and Zhao, Yanzhe and Zhou, Yongxin and Wang, Yameng and Yang, Yandong and
          Zhou, Yuanjia and Wang, Jue and Wang, Zuojian and Liu, Jinxiang},
  year={2026},
  eprint={2602.05275},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

from tokenreduce.ops import AxisMap, bilinear_axis
from tokenreduce_strategies.avg_pool import AvgPool


@dataclass(frozen=True, kw_only=True)
class BilinearPool(AvgPool):
    """Resizes the token grid by bilinear interpolation."""

    def axis_map(self, n: int, m: int) -> AxisMap:
        return bilinear_axis(n, m)
