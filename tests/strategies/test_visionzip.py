"""VisionZip: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.visionzip import VisionZip

TIE = 2.5e-7


def slow(x, keys, attention, k, share):
    """Position and feature of every output, by position."""
    n = len(x)
    c = min(int(share * k + 0.5), k - 1)
    dominant = sorted(range(n), key=lambda i: (-float(attention[i]), i))[: k - c]
    rest = [i for i in range(n) if i not in dominant]
    targets = [rest[t * (len(rest) // c)] for t in range(c)]
    unit = torch.nn.functional.normalize(keys.double(), dim=-1, eps=1e-8)
    joined = {t: [] for t in targets}
    for i in rest:
        if c and i not in targets:
            cosine = [float(unit[i] @ unit[t]) for t in targets]
            joined[
                next(t for t, s in zip(targets, cosine, strict=True) if s >= max(cosine) - TIE)
            ].append(i)
    outputs = {i: x[i].double() for i in dominant}
    for t, members in joined.items():
        outputs[t] = x[t].double() + (x[members].double().mean(0) if members else 0)
    return sorted(outputs.items())


def tokens_of(cloud, generator, key_channels=4):
    batch, n, _ = cloud.shape
    signals = {
        "class_attention": torch.rand(batch, n, generator=generator),
        "keys": torch.randn(batch, n, key_channels, generator=generator),
    }
    return VisualTokens.from_grid(cloud, (1, n), signals=signals)


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    share = data.draw(st.sampled_from([0.0, 0.15625, 0.5, 0.9]))
    tokens = tokens_of(cloud, torch.Generator().manual_seed(data.draw(st.integers(0, 100))))
    reduction = VisionZip(keep=k, contextual=share)(tokens)
    for b in range(tokens.batch):
        attention, keys = tokens.signal("class_attention")[b], tokens.signal("keys")[b]
        outputs = slow(cloud[b], keys, attention, k, share)
        assert reduction.positions[b].tolist() == [place for place, _ in outputs]
        expected = torch.stack([feature for _, feature in outputs])
        torch.testing.assert_close(reduction.features[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_every_token_flows_somewhere():
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_of(torch.randn(1, 60, 8, generator=generator), generator)
    assert bool((VisionZip(keep=16)(tokens).assignment >= 0).all())
    few = VisionZip(keep=2)(tokens)
    assert int((few.assignment >= 0).sum()) == 2


def test_official_counts_the_class_token():
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_of(torch.randn(1, 576, 8, generator=generator), generator)
    assert VisionZip(keep=64, official=True)(tokens).kept == 63
    assert VisionZip(keep=64, official=True).count_class == "layout"
    # The share is of the whole budget: 40 dominant and 8 contextual tokens of 48, less one.
    forty_eight = VisionZip(keep=48, official=True)(tokens)
    alone = VisionZip(keep=47, contextual=8 / 47)(tokens)
    assert forty_eight.positions.equal(alone.positions)
    assert VisionZip(keep=64).count_class == "exact"


def test_keys_are_averaged_over_heads():
    generator = torch.Generator().manual_seed(0)
    tokens = tokens_of(torch.randn(2, 60, 8, generator=generator), generator, key_channels=12)
    averaged = tokens.signal("keys").reshape(2, 60, 3, 4).mean(2)
    same = VisualTokens(
        tokens.features,
        tokens.layout,
        signals={"keys": averaged, "class_attention": tokens.signal("class_attention")},
    )
    heads = VisionZip(keep=16, key_heads=3)
    assert heads(tokens).assignment.equal(VisionZip(keep=16)(same).assignment)
    with pytest.raises(TokensError, match="key_heads=5"):
        VisionZip(keep=16, key_heads=5)(tokens)


@pytest.mark.parametrize("options", [{"contextual": 1.0}, {"contextual": -0.1}, {"key_heads": 0}])
def test_options(options):
    with pytest.raises(PipelineError):
        VisionZip(keep=4, **options)
