"""Random: seeded by content, and fair."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce.ops import content_seed, counter_uniform
from tokenreduce_strategies.random_keep import RandomKeep


def tokens(batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return VisualTokens.from_grid(torch.randn(batch, 40, 8, generator=generator), (5, 8))


def test_oracle():
    source = tokens(3)
    kept = RandomKeep(keep=7, seed=5)(source).positions
    for b in range(3):
        drawn = counter_uniform(content_seed(source.features[b : b + 1]) + 5, 40)[0].tolist()
        assert kept[b].tolist() == sorted(sorted(range(40), key=lambda n: -drawn[n])[:7])


def test_a_larger_budget_keeps_a_superset():
    small = RandomKeep(keep=5)(tokens()).positions[0].tolist()
    large = RandomKeep(keep=20)(tokens()).positions[0].tolist()
    assert set(small) < set(large)


def test_seeds_and_contents_differ():
    one = RandomKeep(keep=10)(tokens()).positions
    assert not one.equal(RandomKeep(keep=10, seed=1)(tokens()).positions)
    assert not one.equal(RandomKeep(keep=10)(tokens(seed=1)).positions)


def test_every_token_has_its_chance():
    times = torch.bincount(RandomKeep(keep=10)(tokens(800)).positions.flatten(), minlength=40)
    # 200 expected, standard deviation 12.
    assert int(times.min()) > 150
    assert int(times.max()) < 250


@pytest.mark.parametrize("seed", [-1, 1 << 62])
def test_seed_out_of_range(seed):
    with pytest.raises(PipelineError, match="seed"):
        RandomKeep(keep=1, seed=seed)
