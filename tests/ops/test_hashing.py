"""Pseudo-random numbers: an oracle in Python integers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import content_seed, counter_uniform

MASK = (1 << 64) - 1


def splitmix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


@quick
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(1, 20))
def test_counter_uniform(seed, count):
    got = counter_uniform(torch.tensor([seed]), count)
    state = splitmix(seed & MASK)
    bits = [splitmix((state + n * 0x9E3779B97F4A7C15) & MASK) >> 40 for n in range(1, count + 1)]
    assert got.dtype == torch.float32
    assert got[0].tolist() == [b / (1 << 24) for b in bits]


def test_uniform_numbers_are_uniform():
    drawn = counter_uniform(torch.arange(50), 2000)
    assert float(drawn.min()) >= 0
    assert float(drawn.max()) < 1
    histogram = torch.histc(drawn, 10, 0, 1) / drawn.numel()
    assert float((histogram - 0.1).abs().max()) < 0.005
    # Neighbouring seeds are unrelated.
    assert abs(float(torch.corrcoef(drawn[:2])[0, 1])) < 0.1


@quick
@given(clouds())
def test_seed_of_an_item_is_its_own(cloud):
    seeds = content_seed(cloud)
    assert seeds.shape == (len(cloud),)
    assert seeds.dtype == torch.long
    for b in range(len(cloud)):
        assert int(content_seed(cloud[b : b + 1])) == int(seeds[b])


def test_seed_follows_content_but_not_its_last_bits():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 9, 8, generator=generator)
    seeds = content_seed(features)
    assert len(seeds.unique()) == 200
    nudged = features * (1 + 1e-7 * torch.randn(features.shape, generator=generator))
    assert content_seed(nudged).equal(seeds)
    assert content_seed(torch.zeros(1, 1, 1)).equal(content_seed(torch.zeros(1, 1, 1)))
