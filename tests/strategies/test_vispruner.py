"""VisPruner: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies import vispruner
from tokenreduce_strategies.vispruner import VisPruner

TIE = 2.5e-7


def slow(x, a, k, important, step):
    """Attended tokens, then rounds of removal, token by token."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    order = sorted(range(len(x)), key=lambda i: (-float(a[i]), i))
    attended, rest = order[: int(important * k)], order[int(important * k) :]
    while len(rest) > k - len(attended):
        even, odd = rest[::2], rest[1::2]
        if not odd:
            rest = []
            break
        closest = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        stay = len(even) - min(step, len(rest) - (k - len(attended)), len(even))
        # The least similar stay; of equal ones, the most attended.
        limit = sorted(closest.values())[stay - 1] if stay else -9
        surely = [i for i in even if closest[i] < limit - TIE]
        near = [i for i in even if i not in surely and closest[i] <= limit + TIE]
        kept = surely + near[: stay - len(surely)]
        rest = [i for i in rest if i in odd or i in kept]
    return sorted(attended + rest)


def tokens_of(cloud, seed):
    batch, n, _ = cloud.shape
    attention = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))
    return VisualTokens.from_grid(cloud, (1, n), signals={"class_attention": attention})


@quick
@given(clouds(min_tokens=2, max_tokens=16, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    important = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    step = data.draw(st.sampled_from([1, 2, 8]))
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)))
    kept = VisPruner(keep=k, important=important, step=step)(tokens).positions
    attention = tokens.signal("class_attention")
    expected = [slow(x, a, k, important, step) for x, a in zip(cloud, attention, strict=True)]
    assert kept.tolist() == expected


@pytest.mark.parametrize("official", [False, True])
def test_lists_of_nearest_change_nothing(monkeypatch, official):
    features = torch.randn(2, 151, 8, generator=torch.Generator().manual_seed(0))
    tokens = tokens_of(features, 0)
    strategy = VisPruner(keep=20, official=official)
    usual = strategy(tokens).positions
    for nearest in (1, 150):
        monkeypatch.setattr(vispruner, "NEAREST", nearest)
        assert strategy(tokens).positions.equal(usual)


def test_all_important_is_attention_alone():
    tokens = tokens_of(torch.randn(1, 30, 4), 0)
    kept = VisPruner(keep=7, important=1.0)(tokens).positions[0]
    assert set(kept.tolist()) == set(tokens.signal("class_attention")[0].topk(7).indices.tolist())


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(vispruner, "GRAM_LIMIT", 29)
    with pytest.raises(TokensError, match="divprune"):
        VisPruner(keep=7)(tokens_of(torch.randn(1, 30, 4), 0))


@pytest.mark.parametrize("options", [{"important": 1.5}, {"important": -0.1}, {"step": 0}])
def test_options(options):
    with pytest.raises(PipelineError):
        VisPruner(keep=4, **options)
