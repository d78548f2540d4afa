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
    picked = []
    while len(picked) < k:
        base = float(torch.linalg.det(kernel[picked][:, picked])) if picked else 1.0
        gain = {
            i: float(torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]])) / base
            for i in range(len(x))
            if i not in picked
        }
        best = max(gain, key=lambda i: gain[i])
        least = gain[best] - 2.5e-7 * float(kernel[best, best])
        picked.append(next(i for i, g in gain.items() if g >= least))
    return picked


def beside_the_identity(x, k, gamma=0.01):
    """The official arithmetic: float32 gains of about 1, of which small differences are lost."""
    x = x / x.norm(dim=0)
    gram = x @ x.T
    kernel = torch.eye(len(x)) + gamma * gram @ gram.T
    gain, rows, picked = kernel.diagonal().clone(), torch.zeros(0, len(x)), []
    while len(picked) < k:
        i = int(gain.argmax())
        row = (kernel[i] - rows[:, i] @ rows) / gain[i].sqrt()
        rows, gain = torch.cat([rows, row[None]]), gain - row.square()
        picked.append(i)
        gain[picked] = -torch.inf
    return picked


@quick
@given(st.integers(3, 10), st.sampled_from([0.01, 1.0]), st.integers(0, 10_000), st.data())
def test_oracle(n, gamma, seed, data):
    k = data.draw(st.integers(1, n - 1))
    channels = data.draw(st.sampled_from([4, 16]))
    features = torch.randn(2, n, channels, generator=torch.Generator().manual_seed(seed))
    picks = OTPrune(keep=k, gamma=gamma).select(VisualTokens.from_grid(features, (1, n)), k)
    assert picks.tolist() == [slow(x, k, gamma) for x in features]


@pytest.mark.parametrize(
    ("n", "channels", "k", "noise", "seed"),
    [
        (400, 24, 300, 0.3, 18),
        (400, 24, 300, 1.0, 7),
        (211, 48, 126, 1.0, 20),
        (97, 128, 24, 0.3, 0),
    ],
)
def test_equals_the_official_arithmetic(n, channels, k, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(n, 6, generator=generator) @ torch.randn(6, channels, generator=generator)
    x = field + noise * torch.randn(n, channels, generator=generator)
    picks = OTPrune(keep=k).select(VisualTokens.from_grid(x[None], (1, n)), k)
    assert sorted(picks[0].tolist()) == sorted(beside_the_identity(x, k))


def test_options():
    with pytest.raises(PipelineError, match="gamma"):
        OTPrune(gamma=0.0)
