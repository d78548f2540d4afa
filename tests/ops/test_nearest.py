"""Nearest neighbours: all pairs in float64 are the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.errors import TokensError, UnknownName
from tokenreduce.neighbors import exact, nearest, nearest_earlier


def slow_values(queries, keys, metric, exclude_self):
    """``(B, Q, K)`` float64, larger is nearer."""
    q, k = queries.double(), keys.double()
    if metric == "cosine":
        q, k = (torch.nn.functional.normalize(x, dim=-1, eps=1e-8) for x in (q, k))
        values = torch.einsum("bqd,bkd->bqk", q, k)
    else:
        values = -(q[:, :, None] - k[:, None]).norm(dim=-1)
    if exclude_self:
        own = torch.arange(q.shape[1])
        values[:, own, own] = -torch.inf
    return values


@quick
@given(clouds(min_tokens=2), st.sampled_from(["cosine", "euclidean"]), st.booleans(), st.data())
def test_all_pairs(cloud, metric, exclude_self, data):
    keys = cloud if exclude_self else cloud.flip(1)[:, : data.draw(st.integers(1, cloud.shape[1]))]
    k = data.draw(st.integers(1, keys.shape[1] - exclude_self))
    values, indices = nearest(cloud, keys, k, metric=metric, exclude_self=exclude_self)
    assert values.dtype == torch.float32
    expected = slow_values(cloud, keys, metric, exclude_self)
    best = expected.sort(dim=-1, descending=True).values[..., :k]
    sign = 1 if metric == "cosine" else -1
    torch.testing.assert_close(sign * values.double(), best, rtol=1e-4, atol=1e-5)
    found = expected.gather(2, indices)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)
    assert all(len(set(row)) == k for item in indices.tolist() for row in item)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_ties_go_to_the_lowest_index(metric):
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(2, 20, 64, generator=generator)
    frames = torch.cat([frame, frame, frame], dim=1)
    values, indices = nearest(frames, frames, 2, metric=metric, exclude_self=True)
    place = torch.arange(60)
    first = torch.where(place < 20, place + 20, place % 20)
    second = torch.where(place < 40, place % 20 + 40, place % 20 + 20)
    assert indices.sort(dim=-1).values.equal(torch.stack([first, second], -1).expand(2, -1, -1))
    exactly = torch.ones(2, 60, 2) if metric == "cosine" else torch.zeros(2, 60, 2)
    torch.testing.assert_close(values, exactly, rtol=0, atol=1e-5)


def test_a_huge_key_hides_no_neighbour():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 30, 16, generator=generator)
    tokens[0, 7] *= 1e3
    _, indices = nearest(tokens, tokens, 1, metric="euclidean", exclude_self=True)
    expected = slow_values(tokens, tokens, "euclidean", True).argmax(-1, keepdim=True)
    assert indices.equal(expected)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_tiles_change_nothing(monkeypatch, metric):
    tokens = torch.randn(2, 33, 8, generator=torch.Generator().manual_seed(0))
    whole = nearest(tokens, tokens, 3, metric=metric, exclude_self=True)
    monkeypatch.setattr(exact, "TILE_ENTRIES", 300)
    tiled = nearest(tokens, tokens, 3, metric=metric, exclude_self=True)
    torch.testing.assert_close(tiled[0], whole[0])
    assert tiled[1].equal(whole[1])


def test_no_queries():
    values, indices = nearest(torch.ones(1, 0, 3), torch.ones(1, 2, 3))
    assert values.shape == indices.shape == (1, 0, 1)


def test_what_does_not_fit_is_refused():
    tokens = torch.ones(1, 3, 2)
    with pytest.raises(TokensError, match="agree in B and D"):
        nearest(tokens, torch.ones(1, 3, 4))
    with pytest.raises(TokensError, match=r"k lies in \[1, 2\]"):
        nearest(tokens, tokens, 3, exclude_self=True)
    with pytest.raises(UnknownName, match="torch"):
        nearest(tokens, tokens, backend="torhc")


@quick
@given(clouds(min_tokens=1), st.integers(1, 9))
def test_the_most_similar_earlier_token(cloud, tile):
    features = cloud[0]
    rows = torch.arange(0, len(features), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "TILE_ROWS", tile)
        value, place = nearest_earlier(features, rows, backend="torch")
    unit = features[rows].double()
    norm = unit.norm(dim=-1, keepdim=True)
    unit = torch.where(norm == 0, unit.shape[-1] ** -0.5, unit / norm.clamp(min=1e-8))
    cosine = unit @ unit.T
    assert value[0] == -torch.inf
    assert place[0] == -1
    for i in range(1, len(rows)):
        best = cosine[i, :i].max()
        assert float(value[i]) == pytest.approx(float(best), abs=1e-5)
        near = [j for j in range(i) if cosine[i, j] >= best - 2e-6]
        assert int(place[i]) in near
        if len(set(cosine[i, near].round(decimals=9).tolist())) == 1:
            assert int(place[i]) == near[0]


def test_earlier_ties_go_to_the_lowest_index_across_tiles(monkeypatch):
    monkeypatch.setattr(exact, "TILE_ROWS", 4)
    frame = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    _, place = nearest_earlier(frame.repeat(4, 1), torch.arange(20), backend="torch")
    assert place[5:].tolist() == list(range(5)) * 3


def test_earlier_search_of_the_wrong_shape_is_refused():
    with pytest.raises(TokensError, match="features"):
        nearest_earlier(torch.ones(1, 3, 2), torch.arange(3))
