"""Strategies inside the LLM that keep what one attention map ranks highest."""

import pytest
import torch

from tokenreduce import Budget, Layout, VisualTokens
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce_strategies.aim_prune import AIMPrune
from tokenreduce_strategies.fastervlm import FasterVLM
from tokenreduce_strategies.fastv import FastV
from tokenreduce_strategies.feather import Feather
from tokenreduce_strategies.framefusion_prune import FrameFusionPrune
from tokenreduce_strategies.pyramiddrop import PyramidDrop

SIGNALS = [
    (FastV, "last_token_attention"),
    (PyramidDrop, "last_token_attention"),
    (FrameFusionPrune, "decoder_received_attention"),
    (AIMPrune, "attention_page_rank"),
]


def image(**signals):
    features = torch.randn(2, 48, 8, generator=torch.Generator().manual_seed(0))
    return VisualTokens.from_grid(features, (6, 8), signals=signals)


def attention(seed=1):
    return torch.rand(2, 48, generator=torch.Generator().manual_seed(seed)) / 48


@pytest.mark.parametrize(("strategy", "signal"), SIGNALS)
def test_top_k(strategy, signal):
    a = attention().round(decimals=3)
    kept = strategy(keep=9)(image(**{signal: a})).positions
    for item, row in zip(kept.tolist(), a.tolist(), strict=True):
        assert item == sorted(sorted(range(48), key=lambda i: (-row[i], i))[:9])


def test_nothing_may_be_kept_inside_the_llm():
    reduction = FastV(keep=0)(image(last_token_attention=attention()))
    assert reduction.features.shape == (2, 0, 8)
    assert (reduction.assignment == -1).all()
    assert reduction.apply(torch.zeros(2, 48)).shape == (2, 0)
    assert Budget(keep=0).count(48) == 0


def test_nowhere_else():
    with pytest.raises(BudgetError, match="decoder site"):
        FasterVLM(keep=0)


def test_protected_tokens_stay_where_all_others_go():
    layout = Layout(image().layout.coords, torch.arange(48) == 5)
    tokens = VisualTokens(image().features, layout, signals={"last_token_attention": attention()})
    assert FastV(keep=0)(tokens).positions.tolist() == [[5], [5]]


def test_feather_keeps_an_even_grid():
    a = attention()
    kept = Feather(keep=20, stride=3)(image(unrotated_attention=a)).positions
    even = [y * 8 + x for y in (0, 3) for x in (0, 3, 6)]
    for item, row in zip(kept.tolist(), a.tolist(), strict=True):
        others = sorted(set(range(48)) - set(even), key=lambda i: (-row[i], i))
        assert item == sorted([*even, *others[:14]])


@pytest.mark.parametrize(("keep", "even"), [(12, 6), (11, 4), (7, 2), (1, 0)])
def test_feather_widens_the_grid_to_half_of_the_budget(keep, even):
    grid = Feather(stride=3).even_grid(image().coords, keep)
    assert int(grid.sum()) == even


def test_feather_without_a_grid_is_attention_alone():
    a = attention()
    kept = Feather(keep=5, stride=0)(image(unrotated_attention=a)).positions
    assert kept.equal(a.topk(5).indices.sort(1).values)
    with pytest.raises(PipelineError, match="stride"):
        Feather(stride=-1)


@pytest.mark.parametrize("keep", [{"keep": 9}, {"keep_ratio": 0.2}])
def test_feather_keeps_the_grid_beside_the_official_budget(keep):
    a = attention()[:1]
    tokens = VisualTokens(image().features[:1], image().layout, signals={"unrotated_attention": a})
    reduction = Feather(official=True, **keep)(tokens)
    even = {y * 8 + x for y in (0, 3) for x in (0, 3, 6)}
    assert reduction.positions[0].tolist() == sorted(even | set(a[0].topk(9).indices.tolist()))
