"""Keeps tokens whose distribution is close to that of all tokens, by a determinant.

Idea: the kept tokens should be distributed like all tokens, in the sense of optimal transport. A
bound on that distance leads to a log-determinant, which is submodular and can be maximized
greedily.

Algorithm:
    1. divide each channel by its norm over the tokens; G = X X^T;
    2. kernel K = I + ``gamma`` G G^T;
    3. greedily add the token that most enlarges det(K_S), k times, by Cholesky updates.

Shapes: features ``(B, N, D)`` -> picks ``(B, k)`` -> kept ``(B, k, D)``. Cost: O(N D min(N, D))
for G or X^T X, whichever is smaller, O(k N min(N, D)) for the picked rows of the kernel, O(k^2 N)
for the updates, O(k N) memory.

Deviations from the official code: it squares G, at O(N^3); its retries after failed steps are not
needed; ties go to the lowest index. Tokens equal those of the official code on recorded cases.

Published: no comparable table.

```bibtex
@inproceedings{chen2026otprune,
  title={{OTPrune}: Distribution-Aligned Visual Token Pruning via Optimal Transport},
  author={Chen, Xiwen and Zhu, Wenhui and Li, Gen and Dong, Xuanzhao and Xiong, Yujian and
          Wang, Hao and Qiu, Peijie and Song, Qingquan and Wang, Zhipeng and Tang, Shao and
          Wang, Yalin and Razi, Abolfazl},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2026},
  eprint={2602.20205},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops.determinant import greedy_determinant
from tokenreduce.ops.similarity import SMALLEST_NORM, gram_matrix
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class OTPrune(Selector):
    """Keeps the tokens that greedily maximize a log-determinant of squared similarities.

    Args:
        gamma: weight of the similarities against the identity, positive.

    Raises:
        PipelineError: if an option is out of range.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gamma < float("inf"):
            raise PipelineError(f"{self.name}: gamma={self.gamma} must be positive and finite.")

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        features = tokens.features.detach().float()
        if tokens.count <= tokens.features.shape[2]:
            norm = features.square().sum(1, keepdim=True).sqrt_()
            gram = gram_matrix(features / norm.clamp_(min=SMALLEST_NORM))
            return greedy_determinant(self.gamma * gram, gram, k, ridge=1.0)
        # X X^T X X^T as X (X^T X) X^T, whose middle is smaller; the norms go there as well.
        middle = gram_matrix(features.mT)
        square = middle.diagonal(dim1=1, dim2=2).clamp(min=SMALLEST_NORM**2)
        middle.div_(square[:, None]).div_(square[:, :, None]).mul_(self.gamma)
        return greedy_determinant(features @ middle, features, k, ridge=1.0)
