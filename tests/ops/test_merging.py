"""Merging as a linear map: dense matrices in float64 are the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import MergeWeights, compose, group_weights, merge_tokens


def dense(weights, rows, columns):
    """``(B, rows, columns)`` float64."""
    matrix = torch.zeros(len(weights.output), rows, columns, dtype=torch.float64)
    for b in range(len(matrix)):
        for o, s, v in zip(*(edge[b].tolist() for edge in weights), strict=True):
            matrix[b, o, s] += v
    return matrix


@st.composite
def maps(draw, batch, rows, columns):
    count = draw(st.integers(1, 8))
    shape = (batch, count)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return MergeWeights(
        torch.randint(0, rows, shape, generator=generator),
        torch.randint(0, columns, shape, generator=generator),
        torch.rand(shape, generator=generator) * draw(st.sampled_from([1.0, 0.0])),
    )


@quick
@given(clouds(), st.data())
def test_group_weights(cloud, data):
    batch, n, _ = cloud.shape
    count = data.draw(st.integers(1, n))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    groups = torch.randint(-1, count, (batch, n), generator=seed)
    sizes = torch.randint(0, 4, (batch, n), generator=seed).float()
    weights = group_weights(groups, sizes, count)
    matrix = dense(weights, count, n)
    for b in range(batch):
        for g in range(count):
            members = [i for i in range(n) if groups[b, i] == g]
            total = sum(float(sizes[b, i]) for i in members)
            for i in range(n):
                share = float(sizes[b, i]) / total if i in members and total else 0.0
                assert float(matrix[b, g, i]) == pytest.approx(share, abs=1e-6)


@quick
@given(clouds(), st.data())
def test_merge_tokens(cloud, data):
    batch, n, _ = cloud.shape
    count = data.draw(st.integers(1, 5))
    weights = data.draw(maps(batch, count, n))
    merged = merge_tokens(cloud, weights, count)
    assert merged.dtype == cloud.dtype
    expected = dense(weights, count, n) @ cloud.double()
    torch.testing.assert_close(merged, expected.to(cloud.dtype), rtol=1e-2, atol=1e-2)
    if cloud.dtype == torch.float32:
        torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge_tokens(cloud[..., 0], weights, count), merged[..., 0])


def test_half_precision_accumulates_in_float32():
    ones = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    everything = group_weights(torch.zeros(1, 4096, dtype=torch.long), torch.ones(1, 4096), 1)
    assert merge_tokens(ones, everything, 1).item() == 1.0


def test_float64_stays_exact_and_gradients_flow():
    tensor = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = group_weights(torch.tensor([[0, 1, 0, -1, 1]] * 2), torch.ones(2, 5), 2)
    # The values themselves are float32.
    mean = (tensor[:, 0] + tensor[:, 2]) / 2
    assert merge_tokens(tensor, weights, 2)[:, 0].equal(mean)
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, weights, 2), (tensor,))


def test_a_group_of_one_is_bit_identical():
    tensor = torch.randn(1, 6, 3)
    weights = group_weights(torch.arange(6)[None], torch.tensor([[1.0, 3, 7, 0.1, 1 / 3, 9]]), 6)
    assert merge_tokens(tensor, weights, 6).equal(tensor)


@quick
@given(clouds(), st.data())
def test_compose(cloud, data):
    batch, n, _ = cloud.shape
    middle, count = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    inner, outer = data.draw(maps(batch, middle, n)), data.draw(maps(batch, count, middle))
    product = dense(compose(outer, inner, middle), count, n)
    expected = dense(outer, count, middle) @ dense(inner, middle, n)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
