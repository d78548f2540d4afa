"""Withdraws all visual tokens after a layer of the LLM.

Idea: in deep layers visual tokens get next to no attention, since text tokens have taken up what
they say. From some layer on they can all go.

Algorithm: at the cut, drop every visual token.

It runs inside the LLM only and takes no budget but ``keep=0``. Which layer is the one option of the
stage; the paper finds it by the divergence of the logits on a few examples (half of the layers for
LLaVA-1.5, about).

Shapes: features ``(B, N, D)`` -> ``(B, 0, D)``. Cost: nothing.
Deviations: none in the tensors; the search for the layer is left to the user. Written from its
description.

Published: LLaDA-V, a diffusion model, keeps 44.5 percent of its performance, LaViDa-Dream 72.3
(table of 2511.15098): layers that suit one model do not suit another.

```bibtex
@inproceedings{lin2025vtw,
  title={Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid
         Inference},
  author={Lin, Zhihang and Lin, Mingbao and Lin, Luxi and Ji, Rongrong},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025},
  eprint={2405.05803},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenreduce.errors import BudgetError
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class VTW(Reducer):
    """Drops every visual token.

    Raises:
        BudgetError: if it is given a budget other than ``keep=0``.
    """

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget.keep != 0:
            raise BudgetError(
                f"{self.name} withdraws all visual tokens, so {self.budget} cannot be met: give no "
                "budget, or a strategy such as fastv."
            )

    def reduce(self, tokens: VisualTokens) -> Reduction:
        none = torch.empty((tokens.batch, 0), dtype=torch.long, device=tokens.features.device)
        return Reduction.from_kept(tokens, none)
