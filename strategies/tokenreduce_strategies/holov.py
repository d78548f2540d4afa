"""Keeps attended tokens of every region, on budgets by attention and variety.

Idea: tokens of highest attention cluster, and what they leave out is the context of the image. Give
each region a budget by how attended and how varied it is, and choose by attention inside it.

Algorithm, with class attention a and ``regions`` equal runs of consecutive tokens:
    1. in a run of s tokens, S = cosines with 0 on the diagonal; of row i the mean is
       m_i = sum_j S_ij / (s - 1), the variety var_i = sum_j (S_ij - m_i)^2 / (s - 1);
    2. token score: 1000 a_i + 0.09 var_i mean(|1000 a|) / (mean(|var|) + 1e-6), means over the run;
       run score: the mean of its tokens;
    3. run r gets floor(k run_r / sum of runs) tokens, what is left over goes one by one to the runs
       of largest score, no run above its own number of tokens;
    4. each run keeps its most attended tokens.

Shapes: features ``(B, N, D)``, class attention ``(B, N)`` -> kept ``(B, k, D)``. Cost:
O(N^2 D / ``regions``) for the cosines; no N x N matrix unless there is one region only.

Deviations from the official code: outputs stand in source order; where a run has fewer tokens than
its share, other runs get the rest. The official code keeps fewer then, and pads with zeros, which
are left out; it does not scale the attention of runs of one token (``official=True`` for both).
Tokens equal those of the official code on recorded cases.

Published: LLaVA-1.5-7B with 128 tokens, 97.4 percent of the full model (table of the ProViP paper).

```bibtex
@inproceedings{zou2025holov,
  title={Don't Just Chase "Highlighted Tokens" in {MLLMs}: Revisiting Visual Holistic Context
         Retention},
  author={Zou, Xin and Lu, Di and Wang, Yizhou and Yan, Yibo and Lyu, Yuanhuiyi and Zheng, Xu and
          Zhang, Linfeng and Hu, Xuming},
  booktitle={Advances in Neural Information Processing Systems},
  year={2025},
  eprint={2510.02912},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import gram_matrix, unit_vectors
from tokenreduce.ops.quotas import kept_indices, top_mask
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.remainders import common_count

#: Most tokens of a region, whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384
#: The scale of attention, and the share of variety, of the official code.
ATTENTION_SCALE, VARIETY_SHARE = 1000.0, 0.09
#: Entries of features or cosines that are worked on at a time: 1 Mi float32 values, 4 MiB.
CACHED_ENTRIES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Keeps the most attended tokens of each region.

    Args:
        regions: how many runs of consecutive tokens, at least 1.
        official: share the budget as the official code does, and so keep fewer tokens than that
            where a run has fewer than its share.

    Raises:
        PipelineError: if an option is out of range.
    """

    regions: int = 16
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regions < 1:
            raise PipelineError(f"{self.name}: regions={self.regions} must be at least 1.")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        attention = tokens.signal("class_attention").detach().float()
        count = min(self.regions, tokens.count)
        least, longer = divmod(tokens.count, count)
        if (longest := least + (longer > 0)) > GRAM_LIMIT:
            raise TokensError(
                f"{self.name} compares all tokens of a region; {longest} tokens are more than "
                f"{GRAM_LIMIT}. Raise regions={self.regions}."
            )
        room = [least + (run < longer) for run in range(count)]
        cut = longer * (least + 1)

        def in_runs(tensor: Tensor) -> list[Tensor]:
            """Runs of equal length together: those that are one token longer, and the others."""
            first, others = tensor[:, :cut], tensor[:, cut:]
            runs = (first.unflatten(1, (longer, least + 1)), others.unflatten(1, (-1, least)))
            return [part for part in runs if part.shape[1]]

        parts = zip(in_runs(tokens.features.detach()), in_runs(attention), strict=True)
        worth = torch.cat([run_scores(*part) for part in parts], dim=1)
        if self.official:
            worth[:, torch.tensor(room) == 1] /= ATTENTION_SCALE
        k = self.count(tokens.count)
        share = official_quotas if self.official else quotas
        shares = torch.tensor([share(weights, room, k) for weights in worth.tolist()])
        common_count(shares.sum(1), strategy=self.name)
        logs = in_runs(attention.log())
        counts = shares.split([part.shape[1] for part in logs], dim=1)
        kept = [top_mask(*part).flatten(1) for part in zip(logs, counts, strict=True)]
        return Reduction.from_kept(tokens, kept_indices(torch.cat(kept, dim=1)))


def run_scores(features: Tensor, attention: Tensor) -> Tensor:
    """``(B, R)`` scores of runs ``(B, R, s, D)``, a few runs at a time."""
    batch, _, size, channels = features.shape
    together = max(1, CACHED_ENTRIES // (batch * size * max(size, channels)))
    parts = zip(features.split(together, 1), attention.split(together, 1), strict=True)
    scores = [
        run_score(unit_vectors(part.flatten(0, 1)), own.flatten(0, 1)).unflatten(0, (batch, -1))
        for part, own in parts
    ]
    return torch.cat(scores, dim=1)


def run_score(unit: Tensor, attention: Tensor) -> Tensor:
    """``(B,)`` how attended and varied a run of unit vectors ``(B, s, D)`` is; steps 1 and 2."""
    others = max(1, unit.shape[1] - 1)
    cosine = gram_matrix(unit)
    cosine.diagonal(dim1=1, dim2=2).zero_()
    mean = cosine.sum(2, keepdim=True) / others
    variety = (cosine - mean).square_().sum(2) / others
    attended = ATTENTION_SCALE * attention
    share = attended.abs().mean(1) / (variety.abs().mean(1) + 1e-6)
    return attended.mean(1) + VARIETY_SHARE * variety.mean(1) * share


def quotas(weights: list[float], room: list[int], k: int) -> list[int]:
    """How many of ``k`` tokens each run keeps; step 3."""
    quota = [min(own, most) for own, most in zip(_whole_shares(weights, k), room, strict=True)]
    by_weight = sorted(range(len(room)), key=lambda run: (-weights[run], run))
    while sum(quota) < k:
        for run in by_weight:
            if quota[run] < room[run] and sum(quota) < k:
                quota[run] += 1
    return quota


def official_quotas(weights: list[float], room: list[int], k: int) -> list[int]:
    """The same, with what a run has no tokens for lost."""
    quota = _whole_shares(weights, k)
    by_weight = sorted(range(len(room)), key=lambda run: (-weights[run], run))
    for run in by_weight[: k - sum(quota)]:
        quota[run] += 1
    return [min(own, most) for own, most in zip(quota, room, strict=True)]


def _whole_shares(weights: list[float], k: int) -> list[int]:
    whole = sum(weights)
    even = not 0 < whole < float("inf")
    return [int(k * (1 / len(weights) if even else weight / whole)) for weight in weights]
