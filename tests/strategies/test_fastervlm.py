"""FasterVLM: the definition, token by token."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.fastervlm import FasterVLM


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n - 1))
    seed = data.draw(st.integers(0, 100))
    attention = torch.randint(1, 5, (batch, n), generator=torch.Generator().manual_seed(seed)) / 16
    tokens = VisualTokens.from_grid(cloud, (1, n), signals={"class_attention": attention})
    kept = FasterVLM(keep=k)(tokens).positions
    for item, a in zip(kept.tolist(), attention.tolist(), strict=True):
        assert item == sorted(sorted(range(n), key=lambda i: (-a[i], i))[:k])
