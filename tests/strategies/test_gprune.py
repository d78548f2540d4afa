"""G-Prune: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies import gprune
from tokenreduce_strategies.gprune import GPrune


def slow(x, similarity, temperature, iterations):
    """Powers of the transition matrix, by definition."""
    n = len(x)
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    c = unit @ unit.T
    edge = c >= similarity - 1e-6
    a = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        total = sum(float((c[i, j] / temperature).exp()) for j in range(n) if edge[i, j])
        for j in range(n):
            if edge[i, j]:
                a[i, j] = float((c[i, j] / temperature).exp()) / total
    power = torch.eye(n, dtype=torch.float64)
    for _ in range(iterations):
        power = power @ a
    v = x.double().norm(dim=1) @ power
    return [float(v[i]) / max(1, int(edge[i].sum())) for i in range(n)]


@quick
@given(clouds(dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    options = {
        "similarity": data.draw(st.sampled_from([0.3, 0.5, 1.0])),
        "temperature": data.draw(st.sampled_from([0.03, 0.5])),
        "iterations": data.draw(st.integers(1, 5)),
    }
    tokens = VisualTokens.from_grid(cloud, (1, cloud.shape[1]))
    expected = torch.tensor([slow(x, **options) for x in cloud])
    torch.testing.assert_close(GPrune(**options).score(tokens), expected, rtol=1e-4, atol=1e-5)


def test_tiles(monkeypatch):
    tokens = VisualTokens.from_grid(torch.randn(2, 70, 4), (7, 10))
    whole = GPrune().score(tokens)
    for limit in (69, 16384):
        monkeypatch.setattr(gprune, "GRAM_LIMIT", limit)
        for rows in (7, 13, 70):
            monkeypatch.setattr(gprune, "TILE_ENTRIES", 70 * rows)
            torch.testing.assert_close(GPrune().score(tokens), whole)


@pytest.mark.parametrize(
    "options",
    [{"similarity": 0.0}, {"similarity": 1.1}, {"temperature": 0.0}, {"iterations": 0}],
)
def test_options(options):
    with pytest.raises(PipelineError):
        GPrune(keep=4, **options)
