"""HoloV: an oracle in the notation of the paper."""

from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies import holov
from tokenreduce_strategies.holov import HoloV, run_score


def slow_run(x, a):
    """The score of one run, token by token."""
    s = len(x)
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    cosine = [[float(unit[i] @ unit[j]) if i != j else 0.0 for j in range(s)] for i in range(s)]
    mean = [sum(row) / max(1, s - 1) for row in cosine]
    var = [
        sum((c - m) ** 2 for c in row) / max(1, s - 1) for row, m in zip(cosine, mean, strict=True)
    ]
    scaled = [1000 * float(one) for one in a]
    share = (sum(scaled) / s) / (sum(var) / s + 1e-6)
    return sum(scaled[i] + 0.09 * var[i] * share for i in range(s)) / s


def slow_choice(a, bounds, worth, k):
    """Quotas, then the most attended tokens of each run."""
    room = [stop - start for start, stop in bounds]
    quota = [min(room[r], floor(k * worth[r] / sum(worth))) for r in range(len(room))]
    while sum(quota) < k:
        for r in sorted(range(len(room)), key=lambda r: (-worth[r], r)):
            if quota[r] < room[r] and sum(quota) < k:
                quota[r] += 1
    kept = []
    for (start, stop), q in zip(bounds, quota, strict=True):
        kept += sorted(range(start, stop), key=lambda i: (-float(a[i]), i))[:q]
    return sorted(kept)


@quick
@given(clouds(min_tokens=2, max_tokens=16, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n - 1))
    regions = data.draw(st.sampled_from([1, 3, 16]))
    seed = data.draw(st.integers(0, 100))
    attention = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.01
    tokens = VisualTokens.from_grid(cloud, (1, n), signals={"class_attention": attention})
    count = min(regions, n)
    sizes = [n // count + (r < n % count) for r in range(count)]
    bounds = [(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(count)]
    kept = HoloV(keep=k, regions=regions)(tokens).positions
    for b in range(batch):
        worth = [
            run_score(cloud_run(cloud, b, *at), attention[b : b + 1, slice(*at)]) for at in bounds
        ]
        worth = [float(one) for one in worth]
        for at, one in zip(bounds, worth, strict=True):
            expected = slow_run(cloud[b, slice(*at)], attention[b, slice(*at)])
            assert one == pytest.approx(expected, rel=1e-3)
        assert kept[b].tolist() == slow_choice(attention[b], bounds, worth, k)


def cloud_run(cloud, b, start, stop):
    return torch.nn.functional.normalize(cloud[b : b + 1, start:stop], dim=-1, eps=1e-8)


def test_full_regions_pass_on_their_share():
    attention = torch.full((1, 12), 1e-6)
    attention[0, :3] = 0.3
    tokens = VisualTokens.from_grid(
        torch.randn(1, 12, 4), (3, 4), signals={"class_attention": attention}
    )
    kept = HoloV(keep=7, regions=4)(tokens).positions[0].tolist()
    assert kept[:3] == [0, 1, 2]
    assert len(kept) == 7


def test_refuses_what_does_not_fit(monkeypatch):
    tokens = VisualTokens.from_grid(
        torch.randn(1, 30, 4), (5, 6), signals={"class_attention": torch.rand(1, 30)}
    )
    monkeypatch.setattr(holov, "GRAM_LIMIT", 14)
    with pytest.raises(TokensError, match="regions=2"):
        HoloV(keep=7, regions=2)(tokens)
    assert HoloV(keep=7, regions=3)(tokens).kept == 7


def test_options():
    with pytest.raises(PipelineError, match="regions"):
        HoloV(regions=0)


def test_official_loses_what_full_regions_cannot_hold():
    attention = torch.full((1, 12), 1e-6)
    attention[0, :3] = 0.3
    tokens = VisualTokens.from_grid(
        torch.randn(1, 12, 4), (3, 4), signals={"class_attention": attention}
    )
    reduction = HoloV(keep=7, regions=4, official=True)(tokens)
    # The first region deserves nearly all seven and has three.
    assert reduction.positions[0].tolist()[:3] == [0, 1, 2]
    assert reduction.kept < 7


def test_official_does_not_scale_regions_of_one_token():
    attention = torch.tensor([[0.01, 0.01, 0.9, 0.02]])
    tokens = VisualTokens.from_grid(
        torch.randn(1, 4, 4), (2, 2), signals={"class_attention": attention}
    )
    # Runs of two, one and one tokens.
    assert HoloV(keep=1, regions=3)(tokens).positions.tolist() == [[2]]
    assert HoloV(keep=1, regions=3, official=True)(tokens).positions.tolist() == [[0]]
