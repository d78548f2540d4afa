"""Small reducers of our own for tests of the framework around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokenreduce.ops import bipartite_soft_matching, content_seed, counter_uniform
from tokenreduce.reducer import Grouping, Merger, Reducer, Scorer, Selector
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class UnevenRandom(Reducer):
    """Keeps a random third to two thirds, how many being decided by content."""

    adaptive: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        order = counter_uniform(content_seed(tokens.features), tokens.count + 1)
        share = (1 + float(order[0, -1])) / 3
        k = max(1, int(tokens.count * share))
        return Reduction.from_kept(tokens, order[:, :-1].argsort(1)[:, :k])


@dataclass(frozen=True, kw_only=True)
class KeepsAll(Reducer):
    """An adaptive strategy that finds nothing redundant."""

    adaptive: ClassVar[bool] = True

    def reduce(self, tokens: VisualTokens) -> Reduction:
        everyone = torch.arange(tokens.count).expand(tokens.batch, -1)
        return Reduction.from_kept(tokens, everyone)


@dataclass(frozen=True, kw_only=True)
class EveryOther(Merger):
    """Merges runs of neighbours, dropping the very first token."""

    def assign(self, tokens: VisualTokens, k: int) -> Tensor | Grouping:
        groups = torch.arange(tokens.count) * k // tokens.count
        groups = groups.repeat(tokens.batch, 1)
        groups[:, 0] = -1
        return groups


@dataclass(frozen=True, kw_only=True)
class Chooses(Selector):
    """Keeps the given indices, right or wrong."""

    indices: tuple[int, ...]

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.tensor([self.indices] * tokens.batch)


@dataclass(frozen=True, kw_only=True)
class MatchesKeys(Merger):
    """Merges even tokens into the odd ones with the most similar keys, where it is given keys."""

    def assign(self, tokens: VisualTokens, k: int) -> Tensor | Grouping:
        keys = tokens.signals.get("keys", tokens.features)
        return Grouping(*reversed(bipartite_soft_matching(keys, tokens.count - k)))


@dataclass(frozen=True, kw_only=True)
class LargestNorm(Scorer):
    """Keeps the tokens of largest norm."""

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)
