"""Keeps tokens that carry information and attention, and merges what comes next into them.

Idea: when tokens are cut inside the LLM, answers get worse as the rank of the token matrix falls.
So rank tokens by what they add to that matrix as well as by attention, and merge, not drop, those
in the middle.

Algorithm, after an early layer of the LLM (the second), with the matrix X of hidden states and a
budget of k:
    1. X = U S V^T; information of token i: g_i = sum_j |U_ij| s_j;
    2. a_i = attention of the prompt's last token to token i, averaged over heads;
    3. score = ``balance`` g / max g + (1 - ``balance``) a / max a; the m = floor(1.5 k) tokens of
       largest score go on (all, if there are fewer), the others are dropped;
    4. the better half of those, floor(m / 2), are targets. The m - k of the other half that are
       most similar to a target, by cosine of hidden states, join it; groups become size-weighted
       means.

Shapes: features ``(B, N, D)``, attention ``(B, N)`` -> merged ``(B, k, D)``. Cost: O(N D min(N, D))
for the decomposition of the smaller Gram matrix, O(k^2 D) for the merge.

Deviations from the official code: it ranks information and attention apart and adds ranks
(``official=True``); here values are added, so that equal tokens stay equal. Batches; ties go to the
lowest index. Tokens and features equal those of the official code on recorded cases.

Published: 22.2 percent of the tokens for 1.54 percent of the accuracy over 11 datasets, up to 1.23x
faster (its abstract).

```bibtex
@article{tan2025tokencarve,
  title={{TokenCarve}: Information-Preserving Visual Token Compression in Multimodal Large Language
         Models},
  author={Tan, Xudong and Ye, Peng and Tu, Chongjun and Cao, Jianjian and Yang, Yaoxin and
          Zhang, Lin and Zhou, Dongzhan and Chen, Tao},
  journal={arXiv preprint arXiv:2503.10501},
  year={2025}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.neighbors import nearest
from tokenreduce.ops import gather_tokens, top_k_indices
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.reduction import DROPPED
from tokenreduce.tokens import VisualTokens

#: Singular values below this part of the largest are rounding.
RANK_TOLERANCE = 1e-3


def information(states: Tensor) -> Tensor:
    """Step 1: ``(B, N)``, from hidden states ``(B, N, D)``."""
    x = states.float()
    wide = x.shape[1] > x.shape[2]
    squares, basis = torch.linalg.eigh(x.mT @ x if wide else x @ x.mT)
    scale = squares.clamp(min=0).sqrt()
    real = scale > RANK_TOLERANCE * scale[:, -1:]
    # U S = X V by the right singular vectors, or from the left ones themselves.
    spread = x @ basis if wide else basis * scale[:, None]
    gain: Tensor = (spread.abs_() @ real[..., None].to(spread.dtype)).squeeze(2)
    return gain


@dataclass(frozen=True, kw_only=True)
class TokenCarve(Merger):
    """Keeps informative, attended tokens, and merges the next best into them.

    Args:
        balance: weight of information against attention, in [0, 1].
        official: add ranks instead of values, as the official code does.

    Raises:
        PipelineError: if ``balance`` is out of range.
    """

    balance: float = 0.5
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise PipelineError(f"{self.name}: balance={self.balance} must lie in [0, 1].")

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        states = tokens.features.detach()
        gain = information(states)
        attention = tokens.signal("last_token_attention").detach().float()
        level = _ranks if self.official else _shares
        score = self.balance * level(gain) + (1 - self.balance) * level(attention)
        most = min(k + k // 2, tokens.count)
        stays = torch.zeros_like(score, dtype=torch.bool)
        stays.scatter_(1, top_k_indices(score, most, scale=score.amax(1, keepdim=True)), True)
        targets = top_k_indices(score, most // 2, scale=score.amax(1, keepdim=True))
        goes = torch.arange(tokens.count, device=score.device).expand_as(stays)
        if most > k:
            rest = kept_indices(stays.scatter(1, targets, False))
            similarity, closest = nearest(
                gather_tokens(states, rest), gather_tokens(states, targets), 1
            )
            joining = top_k_indices(similarity.squeeze(2), most - k, scale=1.0)
            into = targets.gather(1, closest.squeeze(2).gather(1, joining))
            goes = goes.scatter(1, rest.gather(1, joining), into)
        goes = goes.masked_fill(~stays, DROPPED)
        own = torch.arange(tokens.count, device=score.device)
        positions = kept_indices(goes == own)
        groups = torch.searchsorted(positions, goes)
        return Grouping(groups.masked_fill(~stays, DROPPED), positions)


def _shares(values: Tensor) -> Tensor:
    """Of the largest value of each row."""
    return values / values.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def _ranks(values: Tensor) -> Tensor:
    """N for the largest value of each row, 1 for the smallest."""
    order = values.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(values.shape[1], 0, -1, device=values.device, dtype=torch.float32)
    return torch.zeros_like(values).scatter(1, order, ranks.expand_as(values))
