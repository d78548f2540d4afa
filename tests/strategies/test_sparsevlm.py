"""SparseVLM: raters, retained tokens and clusters, token by token."""

import pytest
import torch

from tokenreduce import VisualTokens, load_pipeline
from tokenreduce.errors import PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce_strategies.sparsevlm import SparseVLM, raters


def clip(n=60, words=6):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(2, n, 8, generator=generator)
    signals = {
        "prompt_states": torch.randn(2, words, 8, generator=generator) / 4,
        "prompt_attention": torch.rand(2, n, words, generator=generator),
    }
    return VisualTokens.from_grid(x, (1, n), signals=signals)


def test_raters():
    tokens = clip()
    t = tokens.signal("prompt_states")
    for b, rates in enumerate(raters(tokens.features, t)):
        mean = torch.stack([(t[b] @ x).softmax(0) for x in tokens.features[b]]).mean(0)
        assert rates.tolist() == [bool(r > mean.mean()) for r in mean]
    assert raters(tokens.features, torch.zeros(2, 4, 8)).all()


@pytest.mark.parametrize(("k", "recycle"), [(20, 0.3), (7, 1.0), (1, 0.3), (55, 0.3), (20, 0.0)])
def test_oracle(k, recycle):
    tokens = clip()
    n = tokens.count
    reduction = SparseVLM(keep=k, recycle=recycle)(tokens)
    rates = raters(tokens.features, tokens.signal("prompt_states"))
    clusters, pool = 0, 0
    if recycle and k > 1:
        # The most that the retained ones leave room for: r tokens make r // 10 + 1 clusters.
        for clusters in range(1, k):
            others = n - k + clusters
            pool = min(int(recycle * others) + 1, others)
            if pool // 10 + 1 <= clusters:
                break
    for b in range(2):
        score = tokens.signal("prompt_attention")[b][:, rates[b]].mean(1)
        order = score.argsort(descending=True).tolist()
        retained = sorted(order[: k - clusters])
        again = sorted(order[k - clusters :][:pool])
        expected = {i: [i] for i in retained}
        if clusters:
            peaks = density_peaks(
                tokens.features[b : b + 1, again], torch.tensor([clusters]), neighbors=clusters
            )
            for i, centre in zip(again, peaks.centre_of[0].tolist(), strict=True):
                expected.setdefault(again[centre], []).append(i)
        assert reduction.positions[b].tolist() == sorted(expected)
        for m, place in enumerate(sorted(expected)):
            members = expected[place]
            assert (reduction.assignment[b] == m).nonzero().flatten().tolist() == members
            mean = tokens.features[b, members].mean(0)
            torch.testing.assert_close(reduction.features[b, m], mean)


@pytest.mark.parametrize("cuts", [(300, 200, 110), (303, 110, 36), (66, 30, 17)])
def test_presets_retain_what_the_official_code_retains(cuts):
    # It retains fixed counts, and puts clusters of floor(0.3 m) + 1 of the m others beside them.
    name = {300: "official-192", 303: "official-128", 66: "official-64"}[cuts[0]]
    (stage,) = load_pipeline(f"sparsevlm@{name}").stages
    assert stage.layers == (3, 7, 16)
    n = 576
    for layer, retained in zip(stage.layers, cuts, strict=True):
        k = retained + (int(0.3 * (n - retained)) + 1) // 10 + 1
        reducer = stage.at(layer).reducer
        assert reducer.count(576) == k
        assert reducer.recycled(n, k) == (k - retained, int(0.3 * (n - retained)) + 1)
        n = k


def test_words_that_are_not_looked_at():
    tokens = clip()
    attention = torch.zeros(2, 60, 6)
    tokens = VisualTokens(
        tokens.features,
        tokens.layout,
        signals={**tokens.signals, "prompt_attention": attention},
    )
    assert SparseVLM(keep=20)(tokens).kept == 20


def test_options():
    with pytest.raises(PipelineError, match="recycle"):
        SparseVLM(recycle=1.5)
