"""Keeps tokens of every semantic group: principal components, then suppression within groups.

Idea: principal components of the tokens say what kinds of content an image has. Group tokens by the
component that they load on most, remove near-duplicates within each group, and share the budget
among groups by what remains.

Algorithm, with a budget of k:
    1. X = sigmoid(x), each token centred over its channels; V = the floor(k / 4) leading left
       singular vectors of X; the group of token i is argmax_g |V_ig|;
    2. threshold t = (k / 32) times the mean cosine of two tokens;
    3. within each group, from the most attended token on: a token survives unless its cosine to an
       earlier survivor exceeds t. Survivors rank first, then the others, each by attention;
    4. each group g keeps its q_g first: one each, the others in proportion to the numbers of
       survivors (rounded cumulatively, in the order of the singular values), at most
       min(5 ceil(k / 64), survivors) + u, u the least that suffices, and at most its size; what is
       missing goes to the groups of most survivors.

Shapes: features ``(B, N, D)``, class attention ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N^2 D)
for the Gram matrix, O(N k D) for the components, O(N) for each survivor of the largest group.
Beyond 16384 tokens there is no Gram matrix: O(s^2 D) for each group of s tokens.

Deviations from the official code: its components come from a randomized algorithm; here the same
subspace iteration starts from fixed numbers, so that equal content gives equal tokens. Its budget
counts the class token, which it keeps (``official=True``: one token less than the budget). Tokens
equal those of the official code on recorded cases.

Published: LLaVA-1.5-7B, in percent of the full model on 8 benchmarks, with 128 / 64 tokens:
96.3 / 94.0 (table of the OccamToken paper).

```bibtex
@inproceedings{fang2026prunesid,
  title={Prune Redundancy, Preserve Essence: Vision Token Compression in {VLMs} via Synergistic
         Importance-Diversity},
  author={Fang, Zhengyao and Lyu, Pengyuan and Zhang, Chengquan and Lu, Guangming and Yu, Jun and
          Pei, Wenjie},
  booktitle={International Conference on Learning Representations},
  year={2026},
  eprint={2603.09480},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.ops import TIE_TOLERANCE, counter_uniform, first_argmax, gram_matrix, unit_vectors
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens

#: Most tokens whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384
#: Subspace iterations, as many as the official code runs.
ITERATIONS = 2
#: Tokens of a group that are compared with the others at once where there is no Gram matrix.
BLOCK = 256
#: No cosine is larger, errors of rounding included.
LARGEST_COSINE = 1.001


@dataclass(frozen=True, kw_only=True)
class PruneSID(Reducer):
    """Keeps important and diverse tokens of every principal component.

    Args:
        official: count the class token as the official code does: one token less than the budget.
    """

    official: bool = False

    @property
    def count_class(self) -> CountClass:
        return "layout" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        k = self.count(tokens.count)
        total = max(1, k - 1) if self.official else k
        features = tokens.features.detach().float()
        attention = tokens.signal("class_attention").detach().float()
        groups = component_groups(features, max(1, k // 4))
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, GRAM_LIMIT**2 // tokens.count**2)
        parts = zip(*(t.split(together) for t in (features, attention, groups)), strict=True)
        survives = torch.cat([suppress(*part, factor=k / 32) for part in parts])
        return Reduction.from_kept(tokens, choose(attention, groups, survives, k, total))


def component_groups(features: Tensor, count: int) -> Tensor:
    """``(B, N)`` the principal component, of the ``count`` first, that each token loads on most."""
    tokens = features.sigmoid()
    tokens = tokens - tokens.mean(2, keepdim=True)
    channels = tokens.shape[2]
    rank = min(count, *tokens.shape[1:])
    seed = torch.zeros(1, dtype=torch.long, device=features.device)
    start = counter_uniform(seed, channels * rank).reshape(channels, rank) - 0.5
    basis = torch.linalg.qr(tokens @ start).Q
    for _ in range(ITERATIONS):
        across = torch.linalg.qr(tokens.mT @ basis).Q
        basis = torch.linalg.qr(tokens @ across).Q
    left = torch.linalg.svd((basis.mT @ tokens).double(), full_matrices=False).U
    return first_argmax((basis @ left.float()).abs(), scale=1.0)


def suppress(features: Tensor, attention: Tensor, groups: Tensor, *, factor: float) -> Tensor:
    """Which tokens survive suppression by more attended ones of their group.

    Args:
        features: ``(B, N, D)``.
        attention: ``(B, N)``.
        groups: ``(B, N)`` non-negative integers.
        factor: the threshold, in units of the mean cosine of two tokens.

    Returns:
        ``(B, N)`` booleans.
    """
    batch, n, _ = features.shape
    table = unit_vectors(features)
    total = table.sum(1, dtype=torch.float64).square().sum(1)
    lengths = torch.linalg.vector_norm(table, dim=2)
    pairs = total - lengths.square().sum(1, dtype=torch.float64)
    threshold = (factor * pairs / (n * (n - 1)))[:, None]
    if bool((threshold > LARGEST_COSINE).all()):
        return torch.ones(batch, n, dtype=torch.bool, device=features.device)
    order = attention.argsort(dim=1, descending=True, stable=True)
    if n > GRAM_LIMIT:
        return torch.stack(
            [
                _suppress_in_blocks(*each)
                for each in zip(table, order, groups, threshold, strict=True)
            ]
        )
    # The unit vectors are not needed beside their Gram matrix.
    table = gram_matrix(table)
    item = torch.arange(batch, device=features.device)[:, None]
    place = torch.arange(n, device=features.device).expand(batch, n)
    rank = torch.empty_like(order).scatter_(1, order, place)
    survives = torch.zeros(batch, n, dtype=torch.bool, device=features.device)
    alive = torch.ones_like(survives)
    while bool(alive.any()):
        first = torch.full((batch, int(groups.max()) + 1), n, device=features.device)
        first.scatter_reduce_(1, groups, rank.masked_fill(~alive, n), "amin")
        mine = first.gather(1, groups)
        pick = order.gather(1, mine.clamp(max=n - 1))
        cosine = table[item, place, pick]
        newest = alive & (mine == rank)
        survives |= newest
        alive &= ~newest & (cosine <= threshold + TIE_TOLERANCE)
    return survives


def _suppress_in_blocks(unit: Tensor, order: Tensor, groups: Tensor, threshold: Tensor) -> Tensor:
    """Which tokens of one item survive, group by group.

    Args:
        unit: ``(N, D)`` unit vectors.
        order: ``(N,)`` the tokens from the most attended on.
        groups: ``(N,)`` non-negative integers.
        threshold: ``(1,)``.

    Returns:
        ``(N,)`` booleans.
    """
    survives = torch.ones_like(groups, dtype=torch.bool)
    order = order[groups[order].argsort(stable=True)]
    for members in order.split(torch.bincount(groups).tolist()):
        alive = survives[members]
        for begin in range(0, len(members), BLOCK):
            open_ = begin + alive[begin : begin + BLOCK].nonzero().squeeze(1)
            close = unit[members[open_]] @ unit[members[begin:]].T > threshold + TIE_TOLERANCE
            within = close[:, open_ - begin].triu(1)
            stays = torch.ones_like(open_, dtype=torch.bool)
            for own in range(len(open_)):
                if stays[own]:
                    stays &= ~within[own]
            alive[open_] = stays
            alive[begin + BLOCK :] &= ~close[stays, BLOCK:].any(0)
        survives[members] = alive
    return survives


def choose(attention: Tensor, groups: Tensor, survives: Tensor, k: int, total: int) -> Tensor:
    """``(B, total)`` tokens: of each group its quota, survivors first, then by attention."""
    n, count = attention.shape[1], int(groups.max()) + 1
    order = attention.argsort(dim=1, descending=True, stable=True)
    order = order.gather(
        1, (~survives.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True)
    )
    order = order.gather(1, groups.gather(1, order).argsort(dim=1, stable=True))
    kept = []
    for listed, group, survivor in zip(order, groups, survives, strict=True):
        sizes = torch.bincount(group, minlength=count)
        found = torch.bincount(group[survivor], minlength=count)
        quota = torch.tensor(quotas(sizes.tolist(), found.tolist(), k, total), device=group.device)
        own = group[listed]
        place = torch.arange(n, device=group.device) - (sizes.cumsum(0) - sizes)[own]
        kept.append(listed[place < quota[own]])
    return torch.stack(kept)


def quotas(sizes: list[int], survivors: list[int], k: int, total: int) -> list[int]:
    """How many of ``total`` tokens each group keeps; see step 4.

    Args:
        sizes: tokens of each group, in the order of the singular values.
        survivors: how many of them survived suppression.
        k: the budget.
        total: how many tokens to share out, at most all and at least one for each group.
    """
    cap = [min(5 * -(-k // 64), found) for found in survivors]
    limit = cap
    while sum(limit) < total:
        cap = [one + 1 for one in cap]
        limit = [min(one, size) for one, size in zip(cap, sizes, strict=True)]
    spare = total - sum(size > 0 for size in sizes)
    whole, passed, given, quota = sum(survivors), 0, 0, []
    for found, most in zip(survivors, limit, strict=True):
        passed += found
        # Halves go to the even number, as Python and torch round.
        share = round(spare * passed / whole)
        quota.append(min(most, 1 + share - given) if found else 0)
        given = share
    by_survivors = sorted(range(len(sizes)), key=lambda g: (-survivors[g], g))
    while sum(quota) < total:
        for g in by_survivors:
            if quota[g] < limit[g] and sum(quota) < total:
                quota[g] += 1
    return quota
