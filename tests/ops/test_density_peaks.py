"""Density peaks against their definition."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import density_peaks as module
from tokenreduce.ops.density_peaks import density_peaks

TIE = 1e-6


def slow(x, clusters, q):
    """Centres, and the centre of each token, of one item."""
    n, channels = x.shape
    x = x.double()
    d = [[math.sqrt(float((a - b).square().sum()) / channels) for b in x] for a in x]
    q = min(q, clusters, n)
    density = [math.exp(-sum(v * v for v in sorted(row)[:q]) / q) for row in d]

    def denser(j, i):
        return density[j] > density[i] + TIE or (abs(density[j] - density[i]) <= TIE and j < i)

    largest = max(max(row) for row in d)
    score = []
    for i in range(n):
        apart = [d[i][j] for j in range(n) if denser(j, i)]
        score.append(density[i] * min(apart, default=largest))
    threshold = sorted(score, reverse=True)[clusters - 1]
    tolerance = TIE * largest
    surely = [i for i in range(n) if score[i] > threshold + tolerance]
    near = [i for i in range(n) if abs(score[i] - threshold) <= tolerance]
    centres = sorted(surely + near[: clusters - len(surely)])
    joins = []
    for i in range(n):
        best = min(d[i][c] for c in centres)
        joins.append(i if i in centres else next(c for c in centres if d[i][c] <= best + tolerance))
    return centres, joins


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    batch, n, _ = cloud.shape
    takes_part = torch.tensor(
        [[data.draw(st.booleans()) for _ in range(n - 1)] + [True] for _ in range(batch)]
    )
    clusters = [data.draw(st.integers(1, int(mask.sum()))) for mask in takes_part]
    peaks = density_peaks(cloud, torch.tensor(clusters), neighbors=3, takes_part=takes_part)
    for b, mask in enumerate(takes_part):
        index = mask.nonzero().flatten().tolist()
        centres, joins = slow(cloud[b, mask], clusters[b], 3)
        assert peaks.centres[b].nonzero().flatten().tolist() == [index[c] for c in centres]
        assert peaks.centre_of[b, mask].tolist() == [index[c] for c in joins]
        assert (peaks.centre_of[b, ~mask] == -1).all()


def test_tiles_and_batches_agree(monkeypatch):
    features = torch.randn(5, 20, 8, generator=torch.Generator().manual_seed(0))
    clusters = torch.tensor([1, 3, 7, 20, 10])
    whole = density_peaks(features, clusters)
    monkeypatch.setattr(module, "TILE_ENTRIES", 800)
    for one, other in zip(whole, density_peaks(features, clusters), strict=True):
        assert one.equal(other)


def test_no_cluster_at_all():
    peaks = density_peaks(torch.ones(1, 3, 2), torch.tensor([0]))
    assert not peaks.centres.any()
