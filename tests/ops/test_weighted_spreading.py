"""Weighted farthest-first traversal against its definition."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import weighted_spreading as module
from tokenreduce.ops.weighted_spreading import weighted_farthest_first

TIE = 2.5e-7


def slow(x, w, k):
    """Picks of one item."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    n = len(x)
    d = [[(1 - float(unit[i] @ unit[j])) * float(w[j]) for j in range(n)] for i in range(n)]

    def best(values):
        leader = max(values, key=values.get)
        errors = {j: TIE * max(abs(float(w[j])), abs(float(w[leader]))) for j in values}
        return next(j for j, v in values.items() if v >= values[leader] - errors[j])

    nearest = {
        j: min((d[i][j] for i in range(n) if i != j), default=float("inf")) for j in range(n)
    }
    picked = [best(nearest)]
    while len(picked) < k:
        rest = [j for j in range(n) if j not in picked]
        picked.append(best({j: min(d[i][j] for i in picked) for j in rest}))
    return picked[:k]


@quick
@given(clouds(dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    n = cloud.shape[1]
    weight = st.sampled_from([0.0, 1e-6, 1.1e-6, 0.25, 1.0])
    weights = torch.tensor([[data.draw(weight) for _ in range(n)] for _ in cloud])
    k = data.draw(st.integers(0, n))
    picks = weighted_farthest_first(cloud, weights, k)
    assert picks.tolist() == [slow(x, w, k) for x, w in zip(cloud, weights, strict=True)]


def test_tiles_and_batches_agree(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 20, 8, generator=generator)
    weights = torch.rand(5, 20, generator=generator)
    whole = weighted_farthest_first(features, weights, 9)
    monkeypatch.setattr(module, "CACHED_ENTRIES", 320)
    assert weighted_farthest_first(features, weights, 9).equal(whole)
    monkeypatch.setattr(module, "TILE_ENTRIES", 800)
    assert weighted_farthest_first(features, weights, 9).equal(whole)


def test_beside_a_large_weight_small_ones_still_count():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 8, generator=generator)
    weights = (4 * torch.randn(40, generator=generator)).exp()
    picks = weighted_farthest_first(features[None], weights[None], 30)[0].tolist()
    assert picks == slow(features, weights, 30)
