"""OTPrune: determinants of the kernel, by definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.otprune import OTPrune


def slow(x, k, gamma):
    """Each time, the token of the largest log-determinant."""
    x = x.double() / x.double().norm(dim=0)
    gram = x @ x.T
    kernel = torch.eye(len(x), dtype=torch.float64) + gamma * gram @ gram.T
    tie = 2.5e-7 * float(kernel.diagonal().max() - 1)
    picked = []
    while len(picked) < k:
        base = float(torch.linalg.det(kernel[picked][:, picked])) if picked else 1.0
        gain = {
            i: float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])) / base
            for i in range(len(x))
            if i not in picked
        }
        picked.append(next(i for i, g in gain.items() if g >= max(gain.values()) - tie))
    return picked


@quick
@given(st.integers(3, 10), st.sampled_from([0.01, 1.0]), st.integers(0, 10_000), st.data())
def test_oracle(n, gamma, seed, data):
    k = data.draw(st.integers(1, n - 1))
    channels = data.draw(st.sampled_from([4, 16]))
    features = torch.randn(2, n, channels, generator=torch.Generator().manual_seed(seed))
    picks = OTPrune(keep=k, gamma=gamma).select(VisualTokens.from_grid(features, (1, n)), k)
    assert picks.tolist() == [slow(x, k, gamma) for x in features]


def test_options():
    with pytest.raises(PipelineError, match="gamma"):
        OTPrune(gamma=0.0)
