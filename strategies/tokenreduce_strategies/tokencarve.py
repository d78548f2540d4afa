"""Keeps tokens that carry information and attention, and merges what comes next into them.

Idea: when tokens are cut inside the LLM, answers get worse as the rank of the token matrix falls.
So rank tokens by what they add to that matrix as well as by attention, and merge, not drop, those
in the middle.

Algorithm, after an early layer of the LLM (the second), with the matrix X of hidden states and a
budget of k:
    1. X = U S V^T; information of token i: g_i = sum_j |U_ij| s_j;
    2. a_i = attention of the prompt's last token to token i, averaged over heads;
    3. score = ``balance`` g / max g + (1 - ``balance``) a / max a; the m = round(1.5 k) tokens of
       largest score go on, the others are dropped;
    4. of those, the m - k of lowest score each join the one of the other k whose hidden state is
       most similar by cosine; groups become size-weighted means.

Shapes: features ``(B, N, D)``, attention ``(B, N)`` -> merged ``(B, k, D)``. Cost: O(N D min(N, D))
for the decomposition of the smaller Gram matrix, O(k^2 D) for the merge.

Deviations from the official code: it decomposes the output of the attention block; here the hidden
states after the layer are decomposed. It ranks information and attention apart and adds ranks; here
values are added, so that equal tokens stay equal. Batches. Ties go to the lowest index. Written
from descriptions; not compared on recorded cases.

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
    gain: Tensor = (spread.abs() * real[:, None]).sum(2)
    return gain


@dataclass(frozen=True, kw_only=True)
class TokenCarve(Merger):
    """Keeps informative, attended tokens, and merges the next best into them.

    Args:
        balance: weight of information against attention, in [0, 1].

    Raises:
        PipelineError: if ``balance`` is out of range.
    """

    balance: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise PipelineError(f"{self.name}: balance={self.balance} must lie in [0, 1].")

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        states = tokens.features.detach()
        gain = information(states)
        attention = tokens.signal("last_token_attention").detach().float()
        tiny = torch.finfo(torch.float32).tiny
        parts = [part / part.amax(1, keepdim=True).clamp(min=tiny) for part in (gain, attention)]
        score = self.balance * parts[0] + (1 - self.balance) * parts[1]
        kept = top_k_indices(score, k, scale=1.0)
        extra = min((k + 1) // 2, tokens.count - k)
        following = top_k_indices(score.scatter(1, kept, -torch.inf), extra, scale=1.0)
        ranks = torch.arange(k, device=states.device).expand_as(kept)
        groups = torch.full_like(score, DROPPED, dtype=torch.long).scatter(1, kept, ranks)
        if extra:
            joins = nearest(gather_tokens(states, following), gather_tokens(states, kept), 1)[1]
            groups.scatter_(1, following, joins.squeeze(2))
        return Grouping(groups, kept)
