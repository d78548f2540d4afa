"""AIM, merging part: merges similar tokens within each frame before the LLM.

Idea: patches of a frame that look alike can be averaged before the LLM sees them. Bipartite soft
matching does so at little cost, since each round compares one half of the tokens with the other.

Algorithm, for T frames of P tokens and a budget of k:
    1. every frame gets k / T outputs, the first ones one more where T does not divide k; with
       k < T, the clip is cut into k runs of frames, and each run counts as one frame;
    2. in each frame, while it has n tokens, more than its budget c: the even tokens propose their
       most cosine-similar odd token, and the r = min(n - c, floor(n / 2)) best proposals merge;
    3. an output is the plain mean of what meets in it: a token that already stands for several
       counts once, so that the final weights of source tokens differ.
Ties go to the lowest index. An output stands at the token that never proposed.

Shapes: features ``(B, T P, D)`` -> weights of tokens in outputs -> ``(B, k, D)``. Cost:
O(N P D / 3), linear in frames.

Deviations from the official code: it halves twice, to a quarter of each frame; here any budget is
met. Between rounds tokens stay in source order, whereas the official code lists single sources
first, by falling similarity, and lets the last bits of a product decide which tokens are even
(``official=True`` does likewise; with a quarter of an even grid nothing differs). Similarities
within 2.5e-7 are ties. :func:`merge_rounds` equals the official code on recorded cases. Its second
part, which prunes tokens between layers of the LLM by PageRank over attention, is `aim-prune`.

Published, LLaVA-OneVision-7B, both parts together: VideoMME 58.2 (full model 58.2), MLVU 63.7
(64.7), EgoSchema 59.6 (60.1) at 14.76 of 99.63 TFLOPs (its own table).

```bibtex
@inproceedings{zhong2025aim,
  title={{AIM}: Adaptive Inference of Multi-Modal {LLMs} via Token Merging and Pruning},
  author={Zhong, Yiwu and Liu, Zhuoming and Li, Yin and Wang, Liwei},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  eprint={2412.03248},
  archivePrefix={arXiv}
}
```
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops import gather_tokens
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.tome import merge_round


class MergedFrames(NamedTuple):
    """What the rounds leave of frames.

    Attributes:
        features: ``(F, M, D)`` the outputs.
        positions: ``(F, M)`` the token of the frame that each output stands at.
        groups: ``(F, P)`` the output that each token flows into.
        weights: ``(F, P)`` the weight of each token in its output.
    """

    features: Tensor
    positions: Tensor
    groups: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class AIM(Merger):
    """Merges within frames, by rounds of bipartite soft matching with plain means.

    Args:
        official: list tokens between rounds as the official code does.
    """

    official: bool = False

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        runs = min(frames, k)
        lengths = [places * length for length in _even(frames, runs)]
        budgets = _even(k, runs)
        features = tokens.features.detach().float()
        groups: list[Tensor] = []
        positions: list[Tensor] = []
        weights: list[Tensor] = []
        start = first = done = 0
        while done < runs:
            # Runs of one length and budget form a batch; both change at most once.
            same = done
            while same < runs and (lengths[same], budgets[same]) == (lengths[done], budgets[done]):
                same += 1
            shape = (same - done, lengths[done])
            part = features[:, start : start + shape[0] * shape[1]].unflatten(1, shape)
            merged = merge_rounds(
                part.flatten(0, 1),
                rounds(lengths[done], budgets[done]),
                by_similarity=self.official,
            )
            run = torch.arange(shape[0], device=features.device).repeat(tokens.batch)[:, None]
            for whole, each, offset in (
                (groups, merged.groups + run * budgets[done], first),
                (positions, merged.positions + run * lengths[done], start),
                (weights, merged.weights, 0),
            ):
                whole.append(each.reshape(tokens.batch, -1) + offset)
            start, first, done = start + shape[0] * shape[1], first + shape[0] * budgets[done], same
        return Grouping(torch.cat(groups, 1), torch.cat(positions, 1), torch.cat(weights, 1))


def merge_rounds(
    features: Tensor, merges: Sequence[int], *, by_similarity: bool = False
) -> MergedFrames:
    """Rounds of bipartite soft matching, each with plain means.

    Args:
        features: ``(F, P, D)`` float32 frames.
        merges: how many tokens disappear in each round, at most half of those that are left; a
            round of none changes nothing, order included.
        by_similarity: whether outputs are listed, and matched in the next round, in the official
            order: single sources by falling similarity, then targets by position.

    Returns:
        outputs in that order, or else in source order.
    """
    index = torch.arange(features.shape[1], device=features.device)
    positions = groups = index.expand(features.shape[:2])
    weights = features.new_ones(features.shape[:2])
    for count in filter(None, merges):
        alike = features.new_ones(features.shape[:2])
        done = merge_round(features, features, alike, count)
        share = (1 / done.sizes).gather(1, done.groups)
        weights = weights * share.gather(1, groups)
        groups = done.groups.gather(1, groups)
        positions, features = positions.gather(1, done.stays), done.features
        if not by_similarity:
            order = positions.argsort(dim=1)
            groups = order.argsort(dim=1).gather(1, groups)
            positions, features = positions.gather(1, order), gather_tokens(features, order)
    return MergedFrames(features, positions, groups, weights)


def rounds(tokens: int, keep: int) -> list[int]:
    """How many tokens disappear in each round until ``keep`` are left."""
    merges = []
    while tokens > keep:
        merges.append(min(tokens - keep, tokens // 2))
        tokens -= merges[-1]
    return merges


def _even(total: int, parts: int) -> list[int]:
    """The total in whole parts that differ by at most one, larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]
