"""PruMerge with evenly spaced tokens added to those that the class token singles out.

Idea: outliers of the class attention cluster on the main object, and questions about the background
suffer. Samples at even distances give every region of the image a token.

Algorithm, as PruMerge (see there), but for what is kept:
    1. without a budget: m outliers of the class attention as in PruMerge, then of all positions
       every floor(floor(N / m) / 3)-th (at least every one), so about three samples for each
       outlier;
    2. with a budget of k: k - 1 tokens, of which round(``uniform`` (k - 1)) are spread evenly over
       the tokens that are left once those of largest attention are taken.
Neighbours and the rest are merged as in PruMerge.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)``, class attention ``(B, N)`` -> ``(B, M, D)``.
Cost: O(M N C) for the similarities, O(M ``neighbours`` D) for the sums; memory is tiled.

Deviations from the official code: those of PruMerge; samples run over any number of tokens (the
official grid is written for 576) and reach the last position, which with ``official=True`` they do
not; where everything would be kept, nothing is merged either. Tokens and features equal those of
the official code on recorded cases.

Published: LLaVA-1.5-7B, average of 9 benchmarks, full model 64.9: 61.8 with 128 tokens, 58.7 with
64, 54.5 with 32 (table of the EADP paper). In percent of the full model with 128 / 64 / 32 tokens:
95.7 / 91.3 / 84.7 (table of the OccamToken paper).

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

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import top_k_indices
from tokenreduce_strategies.prumerge import PruMerge
from tokenreduce_strategies.remainders import common_count


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge with evenly spaced tokens beside the outliers of the class attention.

    Args:
        uniform: share of a budget that goes to evenly spaced tokens, in [0, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    uniform: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.uniform <= 1:
            raise PipelineError(f"{self.name}: uniform={self.uniform} must lie in [0, 1].")

    def choose_freely(self, attention: Tensor, share: float, count: int) -> Tensor:
        n = attention.shape[1]
        step = max(1, int(1 / share) // 3) if share else n
        samples = torch.arange(0, n - 1 if self.official else n, step, device=attention.device)
        chosen = torch.zeros_like(attention, dtype=torch.bool)
        chosen[:, samples] = True
        chosen.scatter_(1, top_k_indices(attention.log(), count), True)
        # Items differ in how many samples are outliers as well.
        total = common_count(chosen.sum(1), strategy=self.name)
        return (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :total]

    def choose_within(self, attention: Tensor, count: int) -> Tensor:
        samples = int(self.uniform * count + 0.5)
        top = top_k_indices(attention.log(), count - samples)
        rest = torch.zeros_like(attention, dtype=torch.bool).scatter(1, top, True)
        rest = rest.to(torch.uint8).argsort(dim=1, stable=True)[
            :, : attention.shape[1] - top.shape[1]
        ]
        place = torch.arange(samples, device=attention.device) * 2 + 1
        spaced = rest[:, place * rest.shape[1] // (2 * max(1, samples))]
        return torch.cat([top, spaced], dim=1)
