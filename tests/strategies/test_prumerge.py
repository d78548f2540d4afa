"""PruMerge and PruMerge+: oracles in the notation of the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies import prumerge
from tokenreduce_strategies.prumerge import PruMerge
from tokenreduce_strategies.prumerge_plus import PruMergePlus
from tokenreduce_strategies.remainders import outlier_share

TIE = 2.5e-7


def slow(x, keys, a, kept, neighbours):
    """Position and feature of every output, by position."""
    n = len(x)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1, eps=1e-8)
    outputs = {}
    for i in kept:
        cosine = {j: float(unit[i] @ unit[j]) for j in range(n) if j != i}
        count = min(neighbours, n - 1)
        limit = sorted(cosine.values(), reverse=True)[count - 1]
        surely = [j for j in cosine if cosine[j] > limit + TIE]
        near = [j for j in cosine if j not in surely and cosine[j] >= limit - TIE]
        chosen = surely + near[: count - len(surely)]
        outputs[i] = x[i].double() + sum(float(a[j]) * x[j].double() for j in chosen)
    rest = [j for j in range(n) if j not in kept]
    outputs[rest[-1]] = sum(float(a[j]) * x[j].double() for j in rest)
    return sorted(outputs.items())


def most_attended(a, count):
    return sorted(range(len(a)), key=lambda i: (-float(a[i]), i))[:count]


def spread(a, count, share):
    samples = int(share * count + 0.5)
    top = most_attended(a, count - samples)
    rest = [i for i in range(len(a)) if i not in top]
    return top + [rest[(2 * s + 1) * len(rest) // (2 * samples)] for s in range(samples)]


def tokens_of(cloud, seed):
    batch, n, _ = cloud.shape
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "class_attention": torch.randn(batch, n, generator=generator).mul(2).softmax(1),
        "keys": torch.randn(batch, n, 4, generator=generator),
    }
    return VisualTokens.from_grid(cloud, (1, n), signals=signals)


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    neighbours = data.draw(st.sampled_from([1, 3, 32]))
    plus = data.draw(st.sampled_from([None, 0.0, 0.5, 1.0]))
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)))
    options = {"keep": k, "neighbours": neighbours}
    strategy = PruMerge(**options) if plus is None else PruMergePlus(uniform=plus, **options)
    reduction = strategy(tokens)
    assert int(reduction.synthetic.sum()) == tokens.batch
    for b in range(tokens.batch):
        a, keys = tokens.signal("class_attention")[b], tokens.signal("keys")[b]
        kept = spread(a, k - 1, plus or 0.0)
        outputs = slow(cloud[b], keys, a, kept, neighbours)
        assert reduction.positions[b].tolist() == [place for place, _ in outputs]
        expected = torch.stack([feature for _, feature in outputs])
        torch.testing.assert_close(reduction.features[b].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [2, 9, 100, 577])
def test_outliers(n):
    scores = torch.randn(3, n, generator=torch.Generator().manual_seed(n)).exp()
    for row, share in zip(scores.double().numpy(), outlier_share(scores), strict=True):
        first, third = np.percentile(row, [25, 75])
        assert float(share) == (row > third + 1.5 * (third - first)).mean()


def test_the_data_decide():
    tokens = tokens_of(torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(0)), 0)
    outliers = round(200 * float(outlier_share(tokens.signal("class_attention"))))
    assert PruMerge()(tokens).kept == outliers + 1
    step = int(200 / outliers) // 3
    top = most_attended(tokens.signal("class_attention")[0], outliers)
    assert PruMergePlus()(tokens).kept == len({*top, *range(0, 200, step)}) + 1
    last = PruMergePlus(official=True).choose(tokens.signal("class_attention"))
    assert last.tolist() == [sorted({*top, *range(0, 199, step)})]


def test_items_that_differ_go_one_by_one():
    tokens = tokens_of(torch.randn(3, 200, 8, generator=torch.Generator().manual_seed(0)), 0)
    with pytest.raises(TokensError, match="one by one"):
        PruMerge()(tokens)
    assert PruMerge(official=True)(tokens).positions.shape[0] == 3


def test_official_keeps_the_rest_alone_where_nothing_stands_out():
    tokens = tokens_of(torch.randn(1, 30, 4), 0)
    flat = torch.full((1, 30), 1 / 30)
    signals = {"class_attention": flat, "keys": tokens.signal("keys")}
    tokens = VisualTokens(tokens.features, tokens.layout, signals=signals)
    for reducer in (PruMerge(official=True), PruMerge(official=True, keep_ratio=0.02)):
        reduction = reducer(tokens)
        assert reduction.positions.tolist() == [[29]]
        torch.testing.assert_close(reduction.features[:, 0], tokens.features.mean(1))
    assert PruMerge()(tokens).kept == 2


def test_official_budgets_have_one_more():
    tokens = tokens_of(torch.randn(1, 196, 8), 0)
    assert PruMerge(keep_ratio=0.125, official=True)(tokens).kept == 25
    assert PruMerge(keep=195, official=True)(tokens).kept == 196
    classes = [
        PruMerge(official=o, **b).count_class for o in (False, True) for b in ({}, {"keep": 3})
    ]
    assert classes == ["adaptive", "exact", "adaptive", "layout"]


def test_everything_sampled_stays_as_it_is():
    attention = torch.full((1, 12), 0.01)
    attention[0, [2, 7]] = 0.45
    tokens = tokens_of(torch.randn(1, 12, 4), 0)
    signals = {"class_attention": attention, "keys": tokens.signal("keys")}
    tokens = VisualTokens(tokens.features, tokens.layout, signals=signals)
    # Two outliers of twelve: every second token.
    assert PruMergePlus()(tokens).kept == 8
    attention[0, 3] = 0.45
    reduction = PruMergePlus()(tokens)
    assert reduction.kept == 12
    assert reduction.features.equal(tokens.features)
    assert reduction.reason


def test_tiled_similarities(monkeypatch):
    tokens = tokens_of(torch.randn(2, 60, 8), 0)
    whole = PruMerge(keep=20)(tokens).features
    monkeypatch.setattr(prumerge, "TILE_ENTRIES", 2 * 60 * 7)
    torch.testing.assert_close(PruMerge(keep=20)(tokens).features, whole)


def test_options():
    with pytest.raises(PipelineError, match="neighbours"):
        PruMerge(neighbours=0)
    with pytest.raises(PipelineError, match="uniform"):
        PruMergePlus(uniform=2.0)
