"""Bipartite soft matching: an oracle in the notation of the paper."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import TIE_TOLERANCE, bipartite_match, bipartite_soft_matching, matching


def slow_partners(x):
    """For every token of A: its most similar token of B, and how similar."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    partners = {}
    for i in a:
        similarity = [float(unit[i] @ unit[j]) for j in b]
        best = next(n for n, s in enumerate(similarity) if s >= max(similarity) - TIE_TOLERANCE)
        partners[i] = (b[best], similarity[best])
    return partners


def slow_round(x, r, class_token):
    """Where every token goes, and the order of the outputs but for ties."""
    n = len(x)
    partners = slow_partners(x)
    r = min(r, (n - class_token) // 2)
    may = [i for i in partners if not (class_token and i == 0)]
    merged = []
    if r:
        threshold = sorted((partners[i][1] for i in may), reverse=True)[r - 1]
        surely = [i for i in may if partners[i][1] > threshold + TIE_TOLERANCE]
        near = [i for i in may if i not in surely and partners[i][1] >= threshold - TIE_TOLERANCE]
        merged = surely + near[: r - len(surely)]
    goes = [partners[i][0] if i in merged else i for i in range(n)]
    return goes, {i for i in partners if i not in merged}


@quick
@given(clouds(min_tokens=2))
def test_partners(cloud):
    match = bipartite_match(cloud)
    assert match.source.tolist() == list(range(0, cloud.shape[1], 2))
    assert match.target.tolist() == list(range(1, cloud.shape[1], 2))
    for b, item in enumerate(cloud):
        expected = slow_partners(item)
        assert match.partner[b].tolist() == [partner for partner, _ in expected.values()]
        similarity = torch.tensor([s for _, s in expected.values()])
        torch.testing.assert_close(match.similarity[b], similarity.float(), rtol=1e-5, atol=2e-6)


@quick
@given(clouds(min_tokens=2), st.integers(0, 8), st.booleans())
def test_round(cloud, merges, class_token):
    batch, n, _ = cloud.shape
    done = bipartite_soft_matching(cloud, merges, class_token=class_token)
    kept = n - min(merges, (n - class_token) // 2)
    assert done.stays.shape == (batch, kept)
    for b, item in enumerate(cloud):
        goes, single = slow_round(item, merges, class_token)
        stays = done.stays[b].tolist()
        assert [stays[row] for row in done.groups[b].tolist()] == goes
        assert set(stays[: len(single)]) == single
        assert stays[len(single) :] == list(range(1, n, 2))
        if class_token:
            assert stays[: len(single)] == sorted(single)
            assert stays[0] == 0
        else:
            similarity = [slow_partners(item)[i][1] for i in stays[: len(single)]]
            assert all(x >= y - 1e-6 for x, y in pairwise(similarity))


@quick
@given(clouds(min_tokens=4))
def test_alone_as_in_a_batch(cloud):
    together = bipartite_soft_matching(cloud, 2)
    for b in range(len(cloud)):
        alone = bipartite_soft_matching(cloud[b : b + 1], 2)
        assert alone.groups[0].sort().values.equal(together.groups[b].sort().values)
        assert alone.stays[0].sort().values.equal(together.stays[b].sort().values)


def test_tiles_change_nothing(monkeypatch):
    keys = torch.randn(2, 51, 8, generator=torch.Generator().manual_seed(0))
    whole = bipartite_match(keys)
    monkeypatch.setattr(matching, "TILE_ENTRIES", 200)
    tiled = bipartite_match(keys)
    assert tiled.partner.equal(whole.partner)
    torch.testing.assert_close(tiled.similarity, whole.similarity)


def test_of_equally_similar_targets_the_first_wins():
    keys = torch.tensor([[[1.0, 0.0], [1.0, 5e-4], [9.0, 0.0], [1.0, 0.0]]])
    assert bipartite_match(keys).partner.tolist() == [[1, 1]]
