"""On a CUDA device: the same tokens as on the CPU, and the same bits every time."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.neighbors import nearest
from tokenreduce.ops import top_k_indices
from tokenreduce.plugins import installed
from tokenreduce.testing import Subject

pytestmark = pytest.mark.gpu


def on_cuda(tokens):
    signals = {name: signal.cuda() for name, signal in tokens.signals.items()}
    return VisualTokens(tokens.features.cuda(), tokens.layout, signals=signals)


@pytest.mark.parametrize(
    "name", [name for name, record in installed().strategies.items() if not record.needs_weights]
)
@pytest.mark.parametrize("grid", [(24, 24), (4, 12, 12)])
def test_as_on_the_cpu(name, grid):
    subject = Subject.of(name)
    tokens = subject.image(*grid, batch=2)
    reducer = subject.create(keep_ratio=0.125)
    if subject.record.count == "adaptive":
        tokens = tokens.item(0)
    expected, got = reducer(tokens), reducer(on_cuda(tokens))
    assert got.positions.cpu().equal(expected.positions)
    assert got.assignment.cpu().equal(expected.assignment)
    torch.testing.assert_close(got.features.cpu(), expected.features, rtol=1e-4, atol=1e-4)
    again = reducer(on_cuda(tokens))
    assert again.features.equal(got.features)


def test_a_long_item() -> None:
    subject = Subject.of("lftr")
    tokens = subject.image(72, 72, batch=1)
    reducer = subject.create(keep_ratio=0.0625)
    assert on_cuda(tokens).features.is_cuda
    got, expected = reducer(on_cuda(tokens)), reducer(tokens)
    assert got.positions.cpu().equal(expected.positions)


@pytest.mark.parametrize("k", [1, 5, 60])
def test_top_k(k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.randint(0, 9, (4, 100), generator=generator) / 9
    assert top_k_indices(scores.cuda(), k).cpu().equal(top_k_indices(scores, k))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_nearest(metric):
    tokens = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    values, indices = nearest(tokens, tokens, 4, metric=metric, exclude_self=True)
    found = nearest(tokens.cuda(), tokens.cuda(), 4, metric=metric, exclude_self=True)
    torch.testing.assert_close(found[0].cpu(), values, rtol=1e-4, atol=1e-4)
    assert found[1].sort(-1).values.cpu().equal(indices.sort(-1).values)
