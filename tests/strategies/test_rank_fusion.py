"""Rank fusion and the text-guided sampler: their scores by definition."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.rank_fusion import RankFusion
from tokenreduce_strategies.text_guided_sampler import TextGuidedSampler


def image(**signals):
    features = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
    return VisualTokens.from_grid(features, (5, 6), signals=signals)


def test_ranks():
    generator = torch.Generator().manual_seed(0)
    # Steps, so that some are equal and share a rank.
    a = torch.randint(0, 9, (2, 30), generator=generator) / 8
    b = torch.randint(0, 9, (2, 30), generator=generator) * 100.0
    tokens = image(class_attention=a, received_attention=b)
    kept = RankFusion(keep=7, balance=0.3)(tokens).positions
    for item, first, second in zip(kept.tolist(), a.tolist(), b.tolist(), strict=True):
        rank = [
            0.3 * sum(u > first[i] for u in first) + 0.7 * sum(v > second[i] for v in second)
            for i in range(30)
        ]
        assert item == sorted(sorted(range(30), key=lambda i: (rank[i], i))[:7])


def test_any_signals():
    tokens = image(class_attention=torch.rand(2, 30), keys=torch.rand(2, 30, 4))
    strategy = RankFusion(keep=3, scores=("class_attention", "class_attention"))
    assert strategy.needs == ("class_attention",)
    attention = tokens.signal("class_attention")
    assert strategy(tokens).positions.equal(attention.topk(3).indices.sort(1).values)
    with pytest.raises(PipelineError, match="one value"):
        RankFusion(keep=3, scores=("class_attention", "keys"))(tokens)


def test_sampler():
    text = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    tokens = image(prompt_embeddings=text)
    kept = TextGuidedSampler(keep=6, temperature=0.1)(tokens).positions
    for item, x, t in zip(kept, tokens.features, text, strict=True):
        cosine = torch.nn.functional.cosine_similarity(t[:, None], x[None], dim=2)
        score = (cosine / 0.1).softmax(1).mean(0)
        assert item.equal(score.topk(6).indices.sort().values)
    with pytest.raises(TokensError, match="LLM's space"):
        TextGuidedSampler(keep=6)(image(prompt_embeddings=torch.zeros(2, 3, 5)))


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (RankFusion, {"scores": ("keys",)}),
        (RankFusion, {"balance": 2.0}),
        (TextGuidedSampler, {"temperature": 0.0}),
    ],
)
def test_options(strategy, options):
    with pytest.raises(PipelineError):
        strategy(keep=4, **options)
