"""Keeps dominant tokens and merges the rest into contextual ones.

Idea: a few tokens hold most of the class token's attention; keep those as they are. What is left
may still matter, so it is not dropped but merged, by similarity, into a few evenly spaced tokens.

Algorithm, with a budget of k, of which c = round(``contextual`` k) tokens are contextual:
    1. dominant: the k - c tokens of largest class attention;
    2. contextual: of the R remaining tokens, in source order, every floor(R / c)-th is a target;
    3. every other token joins the target whose attention key is most similar by cosine;
    4. a target t with the joined tokens J becomes x_t + mean_{j in J} x_j.

Shapes: features ``(B, N, D)``, keys ``(B, N, C)``, class attention ``(B, N)`` -> merged
``(B, k, D)``. Cost: O(c N C) for the similarities, O(N D) for the merge; memory is tiled.

Deviations from the official code: it reduces the encoder's output before the projector; here
projected features are reduced, which is not the same where the projector is not linear. The budget
is met exactly in tokens of the image; the official code counts the class token, which it keeps
(with ``official=True`` one token less is kept for that reason, since the projector drops it).
Outputs stand in source order; the official code lists dominant tokens first. Keys are compared as
given; the official code averages them over heads (``key_heads``). A budget of less than half a
contextual token drops the rest. Step 4 is the official one: a sum of two, not a mean. Tokens and
features equal those of the official code on recorded cases.

Published: LLaVA-1.5-7B, average of 9 benchmarks, full model 64.9: 62.5 with 128 tokens, 60.3 with
64, 56.0 with 32 (table of the EADP paper). In percent of the full model with 192 / 128 / 64 tokens:
97.9 / 96.8 / 93.2 (table of the MMTok paper).

```bibtex
@inproceedings{yang2025visionzip,
  title={{VisionZip}: Longer is Better but Not Necessary in Vision Language Models},
  author={Yang, Senqiao and Chen, Yukang and Tian, Zhuotao and Wang, Chengyao and Li, Jingyao and
          Yu, Bei and Jia, Jiaya},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  eprint={2412.04467},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.neighbors import nearest
from tokenreduce.ops import MergeWeights, merge_tokens, top_k_indices
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.tokens import VisualTokens


class Zip(NamedTuple):
    """Which tokens stay, and what becomes of the others.

    Attributes:
        positions: ``(B, k)`` dominant tokens and targets, ascending.
        groups: ``(B, N)`` the row of ``positions`` that each token flows into, -1 if dropped.
        weights: ``(B, N)`` how much of each token flows there.
    """

    positions: Tensor
    groups: Tensor
    weights: Tensor


def zip_tokens(attention: Tensor, keys: Tensor, *, dominant: int, contextual: int) -> Zip:
    """Choose dominant tokens and targets, and send every other token to a target.

    Args:
        attention: ``(B, N)`` class attention.
        keys: ``(B, N, C)``.
        dominant: how many tokens stay as they are.
        contextual: how many targets; dominant + contextual <= N.
    """
    batch, n = attention.shape
    positions = torch.arange(n, device=attention.device).expand(batch, n)
    stays = torch.zeros(batch, n, dtype=torch.bool, device=attention.device)
    stays.scatter_(1, top_k_indices(attention.float().log(), dominant), True)
    rest = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, : n - dominant]
    step = rest.shape[1] // max(1, contextual)
    targets = rest[:, torch.arange(contextual, device=attention.device) * step]
    stays.scatter_(1, targets, True)
    order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)
    kept, others = order.split([dominant + contextual, n - dominant - contextual], dim=1)
    goes = positions.scatter(1, others, DROPPED)
    weights = torch.ones_like(attention, dtype=torch.float32)
    if contextual and others.shape[1]:
        item = torch.arange(batch, device=attention.device)[:, None]
        closest = nearest(keys[item, others], keys[item, targets], 1)[1].squeeze(2)
        joined = targets.gather(1, closest)
        crowd = torch.zeros_like(weights).scatter_add(1, joined, torch.ones_like(joined).float())
        goes.scatter_(1, others, joined)
        weights.scatter_(1, others, 1 / crowd.gather(1, joined))
    rows = torch.zeros_like(goes).scatter(1, kept, positions[:, : kept.shape[1]])
    groups = rows.gather(1, goes.clamp(min=0)).masked_fill(goes < 0, DROPPED)
    return Zip(kept, groups, weights)


@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """Keeps the tokens of largest class attention and merges the rest into spaced ones.

    Args:
        contextual: share of the budget that goes to contextual tokens, in [0, 1).
        key_heads: attention heads whose keys lie side by side in the signal, averaged before they
            are compared; 1 compares the keys as they are.
        official: count the class token as the official code does: one token less than the budget.

    Raises:
        PipelineError: if an option is out of range.
    """

    contextual: float = 0.15625
    key_heads: int = 1
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise PipelineError(f"{self.name}: contextual={self.contextual} must lie in [0, 1).")
        if self.key_heads < 1:
            raise PipelineError(f"{self.name}: key_heads={self.key_heads} must be at least 1.")

    @property
    def count_class(self) -> CountClass:
        return "layout" if self.official else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        budget = self.count(tokens.count)
        k = max(1, budget - 1) if self.official else budget
        contextual = min(int(self.contextual * budget + 0.5), k - 1)
        keys = tokens.signal("keys").detach()
        if keys.shape[2] % self.key_heads:
            raise TokensError(
                f"{self.name}: keys of {keys.shape[2]} channels are not key_heads={self.key_heads} "
                "heads side by side."
            )
        if self.key_heads > 1:
            keys = keys.float().unflatten(2, (self.key_heads, -1)).mean(2)
        zipped = zip_tokens(
            tokens.signal("class_attention").detach(),
            keys,
            dominant=k - contextual,
            contextual=contextual,
        )
        source = torch.arange(tokens.count, device=keys.device).expand_as(zipped.groups)
        weights = MergeWeights(
            zipped.groups.clamp(min=0),
            source,
            zipped.weights.masked_fill(zipped.groups < 0, 0),
        )
        return Reduction(
            features=merge_tokens(tokens.features, weights, k),
            positions=zipped.positions,
            assignment=zipped.groups,
            weights=weights,
        )
