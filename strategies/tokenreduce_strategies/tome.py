"""Merges similar tokens by bipartite soft matching, round after round.

Idea: compare every even token with every odd one, and merge the pairs that are most alike into
size-weighted means. One round is cheap, since each token takes part once; rounds repeat until the
budget is met.

Algorithm, with N tokens x of sizes s, their keys c (the tokens themselves, where they carry none)
and a budget of k:
    1. split the tokens by position into sources A (even) and targets B (odd);
    2. for each a in A: its partner is argmax_{b in B} cos(c_a, c_b);
    3. merge the r = min(N - k, floor(N / 2)) sources most similar to their partners into them:
       x_b <- (s_b x_b + sum s_a x_a) / (s_b + sum s_a), s_b <- s_b + sum s_a, and keys like tokens;
    4. the output stands at the target's position; N <- N - r; repeat from 1 until N = k.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)`` -> groups ``(B, N)`` in [0, k) -> merged
``(B, k, D)``. Cost: O(N^2 C / 4) in the first round, a quarter of that in the next, so at most
O(N^2 C / 3).

Deviations from the official code: it matches attention keys inside each block of the encoder and
removes a fixed number per block; at the projector site, features are matched after the projector,
until the budget is met exactly. Between rounds tokens stay in source order (the official order, by
similarity, would let the last bits of a product decide which tokens are even). Similarities within
2.5e-7 are ties, and the first token wins. Attention over merged tokens is not corrected by log
size: the LLM stays as it is. One round, :func:`merge_round`, equals the official code on recorded
cases.

Published, on LLaVA-1.5-7B in percent of the full model: 88.5 with 192 tokens, 70.1 with 64 (table
of the VScan repository), 88.9 with 192, 71.1 with 64 (SparseVLM). Those merge inside the encoder.

```bibtex
@inproceedings{bolya2023tome,
  title={Token Merging: Your {ViT} But Faster},
  author={Bolya, Daniel and Fu, Cheng-Yang and Dai, Xiaoliang and Zhang, Peizhao and
          Feichtenhofer, Christoph and Hoffman, Judy},
  booktitle={International Conference on Learning Representations},
  year={2023},
  eprint={2210.09461},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops import (
    bipartite_soft_matching,
    group_weights,
    merge_tokens,
)
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.tokens import VisualTokens


class MergeRound(NamedTuple):
    """What one round leaves.

    Attributes:
        features: ``(B, M, D)`` size-weighted means.
        sizes: ``(B, M)`` float32, how many tokens each stands for.
        stays: ``(B, M)`` the token of the round that each output stands at.
        groups: ``(B, N)`` the output that each token of the round flows into.
    """

    features: Tensor
    sizes: Tensor
    stays: Tensor
    groups: Tensor


def merge_round(
    features: Tensor, keys: Tensor, sizes: Tensor, merges: int, *, class_token: bool = False
) -> MergeRound:
    """One round: at most half of the tokens merge into the other half.

    Args:
        features: ``(B, N, D)``, what is merged.
        keys: ``(B, N, K)``, what is compared.
        sizes: ``(B, N)`` float32, how many tokens each stands for.
        merges: how many tokens disappear, at most (N - protected) // 2.
        class_token: whether token 0 is a class token, which merges into no other.

    Returns:
        outputs in the official order: single sources by falling similarity (by position with a
        class token), then all targets by position.
    """
    matching = bipartite_soft_matching(keys, merges, class_token=class_token)
    count = matching.stays.shape[1]
    merged_sizes = sizes.new_zeros(matching.stays.shape).scatter_add(1, matching.groups, sizes)
    weights = group_weights(matching.groups, sizes, count)
    return MergeRound(merge_tokens(features, weights, count), merged_sizes, *matching)


def compared(tokens: VisualTokens) -> Tensor:
    """What matchings compare: the attention keys where the tokens carry them, else the features."""
    return tokens.signals.get("keys", tokens.features).detach()


def merge_rounds(keys: Tensor, sizes: Tensor, k: int, *, spared: int = 0) -> tuple[Tensor, Tensor]:
    """Rounds of bipartite matching until ``k`` tokens are left; keys merge as the tokens do.

    Args:
        keys: ``(B, N, C)``, what is compared.
        sizes: ``(B, N)`` how many tokens each stands for.
        k: how many tokens to leave, 1 <= k <= N.
        spared: tokens that no round halves; of two tokens one merges all the same.

    Returns:
        ``(B, N)`` group of each token in [0, k), and ``(B, k)`` where the groups stand, ascending.
    """
    keys, sizes = keys.float(), sizes.float()
    positions = torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[0], -1)
    groups = positions
    while (count := positions.shape[1]) > k:
        most = max(1, (count - spared) // 2)
        matching = bipartite_soft_matching(keys, min(count - k, most))
        stays, order = matching.stays.sort(dim=1)
        joins = order.argsort(dim=1).gather(1, matching.groups)
        groups, positions = joins.gather(1, groups), positions.gather(1, stays)
        if stays.shape[1] > k:
            keys = merge_tokens(keys, group_weights(joins, sizes, stays.shape[1]), stays.shape[1])
            sizes = torch.zeros_like(stays, dtype=sizes.dtype).scatter_add(1, joins, sizes)
    return groups, positions


@dataclass(frozen=True, kw_only=True)
class ToMe(Merger):
    """Merges by rounds of bipartite soft matching on the keys, or else on the features."""

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        return Grouping(*merge_rounds(compared(tokens), tokens.sizes, k))
