"""TRIM: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import TokensError
from tokenreduce_strategies.trim import Trim


def slow(x, v, t, k):
    """Position and feature of every output, by position."""
    n = len(x)
    prompt = t.double().mean(0)
    relevance = [-float(v[i].double() @ prompt) for i in range(n)]
    kept = sorted(range(n), key=lambda i: (-relevance[i], i))[: k - 1]
    rest = [i for i in range(n) if i not in kept]
    outputs = {i: x[i].double() for i in kept}
    outputs[rest[-1]] = sum(x[i].double() for i in rest) / len(rest)
    return sorted(outputs.items())


def tokens_of(cloud, seed):
    batch, n, _ = cloud.shape
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "joint_image_embeddings": torch.randn(batch, n, 6, generator=generator),
        "joint_text_embeddings": torch.randn(batch, 2, 6, generator=generator),
    }
    return VisualTokens.from_grid(cloud, (1, n), signals=signals)


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)))
    reduction = Trim(keep=k)(tokens)
    assert int(reduction.synthetic.sum()) == tokens.batch
    for b in range(tokens.batch):
        v, t = (tokens.signal(f"joint_{side}_embeddings")[b] for side in ("image", "text"))
        outputs = slow(cloud[b], v, t, k)
        assert reduction.positions[b].tolist() == [place for place, _ in outputs]
        expected = torch.stack([feature for _, feature in outputs])
        torch.testing.assert_close(reduction.features[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_every_token_is_accounted_for():
    tokens = tokens_of(torch.randn(1, 40, 4), 0)
    assert Trim(keep=9)(tokens).group_sizes().sum() == 40


def test_the_data_decide():
    tokens = tokens_of(torch.randn(3, 100, 4), 0)
    assert 1 < Trim()(tokens.item(0)).kept < 50
    with pytest.raises(TokensError, match="one by one"):
        Trim()(tokens)
    assert Trim(official=True)(tokens).positions.shape[0] == 3


def test_official_counts():
    tokens = tokens_of(torch.randn(1, 576, 4), 0)
    assert Trim(keep_ratio=0.21, official=True)(tokens).kept == 121
    assert Trim(keep=64, official=True)(tokens).kept == 65
    classes = [Trim(official=o, **b).count_class for o in (False, True) for b in ({}, {"keep": 3})]
    assert classes == ["adaptive", "exact", "adaptive", "layout"]


@pytest.mark.parametrize("budget", [{}, {"keep_ratio": 0.02}])
def test_official_counts_may_be_none(budget):
    # No outliers, or less than one token: everything flows into the mean.
    cloud = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    signals = {
        "joint_image_embeddings": torch.ones(2, 40, 6),
        "joint_text_embeddings": torch.ones(2, 1, 6),
    }
    tokens = VisualTokens.from_grid(cloud, (5, 8), signals=signals)
    reduction = Trim(official=True, **budget)(tokens)
    assert reduction.synthetic.tolist() == [[True], [True]]
    torch.testing.assert_close(reduction.features, cloud.mean(1, keepdim=True))
