"""Chains of links: following them one by one is the oracle."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import quick
from tokenreduce.ops.links import follow_links


@quick
@given(st.integers(1, 60), st.integers(0, 999), st.booleans())
def test_follow_links(count, seed, long):
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(count)
    back = torch.rand(count, generator=generator)
    link = (index - 1).clamp(min=0) if long else (back * (index + 1)).long()
    expected = []
    for token in range(count):
        while int(link[token]) != token:
            token = int(link[token])
        expected.append(token)
    assert follow_links(link).tolist() == expected
