"""GreedyPrune: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies import greedyprune
from tokenreduce_strategies.greedyprune import GreedyPrune

TIE = 2.5e-7


def slow(x, t, k, tau):
    """The most salient token left, then everything that repeats it goes."""
    n = len(x)
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    prompt = torch.nn.functional.normalize(t[-1].double(), dim=0, eps=1e-8)
    saliency = (unit @ prompt).tolist()
    picked, aside = [], set()
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked]
        pool = [i for i in rest if i not in aside] or rest
        best = max(saliency[i] for i in pool)
        picked.append(next(i for i in pool if saliency[i] >= best - TIE))
        aside |= {i for i in range(n) if float(unit[i] @ unit[picked[-1]]) > tau + TIE}
    return picked


def tokens_of(cloud, seed):
    batch, n, channels = cloud.shape
    prompt = torch.randn(batch, 3, channels, generator=torch.Generator().manual_seed(seed))
    return VisualTokens.from_grid(cloud, (1, n), signals={"prompt_embeddings": prompt})


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    tau = data.draw(st.sampled_from([-0.51234567, 0.31234567, 0.91234567]))
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)))
    picks = GreedyPrune(keep=k, threshold=tau).select(tokens, k)
    prompts = tokens.signal("prompt_embeddings")
    assert picks.tolist() == [slow(x, t, k, tau) for x, t in zip(cloud, prompts, strict=True)]


def test_repetitions_only_fill():
    frame = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(frame.repeat(1, 3, 1), 0)
    assert GreedyPrune(keep=12)(tokens).positions[0].tolist() == list(range(12))
    assert GreedyPrune(keep=20)(tokens).kept == 20


def test_without_a_gram_matrix(monkeypatch):
    tokens = tokens_of(torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0)), 0)
    whole = GreedyPrune(keep=12).select(tokens, 12)
    monkeypatch.setattr(greedyprune, "GRAM_LIMIT", 59)
    assert GreedyPrune(keep=12).select(tokens, 12).equal(whole)


def test_the_prompt_must_be_comparable():
    features = torch.randn(1, 9, 8)
    signals = {"prompt_embeddings": torch.randn(1, 2, 4)}
    tokens = VisualTokens.from_grid(features, (3, 3), signals=signals)
    with pytest.raises(TokensError, match="4 channels"):
        GreedyPrune(keep=3)(tokens)


def test_options():
    with pytest.raises(PipelineError, match="threshold"):
        GreedyPrune(threshold=1.5)
