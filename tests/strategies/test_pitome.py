"""PiToMe: energies and one round, by definition; further rounds as composition."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies import pitome
from tokenreduce_strategies.pitome import PiToMe, energies


def slow_energy(x, margin, alpha):
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    u = unit @ unit.T - margin
    return torch.where(u >= 0, u, alpha * (u.exp() - 1)).mean(1)


def slow_round(x, merges, margin, alpha):
    """The token that each one merges into."""
    energy = (slow_energy(x, margin, alpha) * 2**16).round().tolist()
    ranked = sorted(range(len(x)), key=lambda i: (-energy[i], i))[: 2 * merges]
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    goes = list(range(len(x)))
    for a in ranked[::2]:
        goes[a] = max(sorted(ranked[1::2]), key=lambda b: float(unit[a] @ unit[b]))
    return goes


def image(seed=0, n=30, **signals):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, n, 6, generator=generator).cumsum(1) / 3
    return VisualTokens.from_grid(x, (1, n), signals=signals)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_energies(alpha, monkeypatch):
    x = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([slow_energy(item, 0.4, alpha) for item in x])
    torch.testing.assert_close(energies(x, 0.4, alpha).double(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(pitome, "TILE_ENTRIES", 90)
    torch.testing.assert_close(energies(x, 0.4, alpha).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [15, 22, 29])
def test_round(k):
    keys = torch.randn(1, 30, 5, generator=torch.Generator().manual_seed(1))
    for tokens, compared in ((image(), image().features), (image(keys=keys), keys)):
        goes = slow_round(compared[0], 30 - k, 0.5, 1.0)
        reduction = PiToMe(keep=k)(tokens)
        places = [i for i in range(30) if goes[i] == i]
        assert reduction.positions[0].tolist() == places
        assert reduction.assignment[0].tolist() == [places.index(i) for i in goes]
        for m, place in enumerate(places):
            members = [i for i in range(30) if goes[i] == place]
            mean = tokens.features[0, members].mean(0)
            torch.testing.assert_close(reduction.features[0, m], mean)


def test_rounds():
    tokens = image()
    half = PiToMe(keep=15)(tokens)
    rest = PiToMe(keep=4)(half.tokens(tokens)[0])
    assert PiToMe(keep=4)(tokens).assignment.equal(half.then(rest).assignment)


def test_options():
    with pytest.raises(PipelineError, match="margin"):
        PiToMe(margin=2.0)
    with pytest.raises(PipelineError, match="alpha"):
        PiToMe(alpha=-1.0)
