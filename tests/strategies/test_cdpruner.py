"""CDPruner: an oracle in the notation of the paper."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.cdpruner import CDPruner, conditional_relevance

TIE = 2.5e-7


def slow(x, v, t, k):
    """Relevance by the paper's formulas, then determinants of every candidate set."""
    x, v, t = (torch.nn.functional.normalize(a.double(), dim=-1) for a in (x, v, t))
    r = [-sum(float(v[i] @ t[p]) for p in range(len(t))) / len(t) for i in range(len(v))]
    low, high = min(r), max(r)
    r = [(one - low + 1e-6) / (high - low) for one in r]
    n = len(x)
    kernel = torch.tensor(
        [[r[i] * float(x[i] @ x[j]) * r[j] for j in range(n)] for i in range(n)],
        dtype=torch.float64,
    )
    picked = []
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked]
        base = float(torch.linalg.det(kernel[picked][:, picked])) if picked else 1.0
        gain = {}
        for i in rest:
            chosen = [*picked, i]
            gain[i] = float(torch.linalg.det(kernel[chosen][:, chosen])) / base
        picked.append(next(i for i, g in gain.items() if g >= max(gain.values()) - TIE))
    return picked


def draw_tokens(batch, n, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "joint_image_embeddings": torch.randn(batch, n, 6, generator=generator),
        "joint_text_embeddings": torch.randn(batch, 3, 6, generator=generator),
    }
    features = torch.randn(batch, n, channels, generator=generator)
    return VisualTokens.from_grid(features, (1, n), signals=signals)


@quick
@given(st.integers(3, 10), st.integers(0, 10_000), st.data())
def test_oracle(n, seed, data):
    k = data.draw(st.integers(1, min(5, n - 1)))
    tokens = draw_tokens(2, n, 16, seed)
    picks = CDPruner(keep=k).select(tokens, k)
    signals = (tokens.signals["joint_image_embeddings"], tokens.signals["joint_text_embeddings"])
    items = zip(tokens.features, *signals, strict=True)
    assert picks.tolist() == [slow(x, v, t, k) for x, v, t in items]


def test_official_relevance_sees_the_batch():
    image, text = torch.randn(2, 9, 4), torch.randn(2, 1, 4)
    image[1] *= -1
    apart, together = (conditional_relevance(image, text, official=o) for o in (False, True))
    assert bool((apart.amin(1) < 1e-5).all())
    assert bool((together.amin(1) < 1e-5).sum() == 1)


def test_equal_relevance_is_pure_diversity():
    tokens = draw_tokens(1, 20, 32, 0)
    signals = {name: torch.ones_like(signal) for name, signal in tokens.signals.items()}
    same = VisualTokens(tokens.features, tokens.layout, signals=signals)
    assert float((conditional_relevance(*signals.values()) - 1).abs().max()) < 0.5
    assert CDPruner(keep=5)(same).kept == 5
