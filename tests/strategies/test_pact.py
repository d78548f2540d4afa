"""PACT: centres one by one, by definition."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import limits
from tokenreduce_strategies.pact import PACT


def slow(x, keys, radius, important, k):
    n = len(x)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    d = (1 - unit @ unit.T).clamp(min=0)
    norm = x.double().norm(dim=1).tolist()
    likely = sorted(range(n), key=lambda i: (-norm[i], i))[: max(k or 1, int(important * n + 0.5))]
    density = {i: sum(float((-((d[i, j] / 2) ** 2)).exp()) for j in likely) for i in likely}
    centres = []
    for i in sorted(likely, key=lambda i: (-density[i], i)):
        if all(d[i, c] > radius for c in centres) and (k is None or len(centres) < k):
            centres.append(i)
    while k is not None and len(centres) < k:
        rest = [i for i in likely if i not in centres]
        centres.append(max(rest, key=lambda i: min(float(d[i, c]) for c in centres)))
    groups = {c: [c] for c in centres}
    for i in range(n):
        nearest = min(centres, key=lambda c: float(d[i, c]))
        if i not in centres and d[i, nearest] <= 1.5 * radius:
            groups[nearest].append(i)
    return groups


def image(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 40, 8, generator=generator)
    keys = torch.randn(1, 40, 3, generator=generator) + 0.5
    return VisualTokens.from_grid(x, (5, 8), signals={"decoder_keys": keys})


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [None, 1, 4, 15, 35])
def test_oracle(seed, k):
    tokens = image(seed)
    groups = slow(tokens.features[0], tokens.signal("decoder_keys")[0], 0.1, 0.55, k)
    reduction = PACT(radius=0.1, keep=k)(tokens)
    assert reduction.positions[0].tolist() == sorted(groups)
    for m, centre in enumerate(sorted(groups)):
        members = sorted(groups[centre])
        assert (reduction.assignment[0] == m).nonzero().flatten().tolist() == members
        torch.testing.assert_close(reduction.features[0, m], tokens.features[0, members].mean(0))


def test_refusals(monkeypatch):
    with pytest.raises(PipelineError, match="radius"):
        PACT(radius=0.0)
    with pytest.raises(PipelineError, match="important"):
        PACT(important=1.5)
    monkeypatch.setattr(limits, "MATRIX_LIMIT", 39)
    with pytest.raises(TokensError, match="no more than"):
        PACT(keep=4)(image(0))
