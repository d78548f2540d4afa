"""HoliTom: oracles in the notation of the paper for windows, still places and merging."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, peaked, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.frames import previous_cosine
from tokenreduce_strategies.holitom import HoliTom, static_windows


def gain(alike, start, end):
    """Redundant tokens of a window."""
    places = len(alike[0])
    return sum(all(alike[t][p] for t in range(start, end)) for p in range(places)) * (end - start)


def partitions(frames, longest):
    """Every way to cut the frames into windows."""
    if frames == 0:
        return [[]]
    return [
        [*rest, (frames - size, frames - 1)]
        for size in range(1, min(frames, longest) + 1)
        for rest in partitions(frames - size, longest)
    ]


@quick
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
def test_windows_gain_the_most(frames, places, longest, seed):
    generator = torch.Generator().manual_seed(seed)
    alike = torch.rand(frames - 1, places, generator=generator) < 0.7
    windows = static_windows(alike, longest)
    totals = [
        sum(gain(alike.tolist(), *span) for span in spans if span[0] < span[1])
        for spans in partitions(frames, longest)
    ]
    assert windows.gain == max(totals)
    mine = sum(gain(alike.tolist(), *span) for span in windows.spans if span[0] < span[1])
    assert mine == windows.gain
    assert [t for a, b in windows.spans for t in range(a, b + 1)] == list(range(frames))
    assert max(b - a + 1 for a, b in windows.spans) <= longest


def slow(x, attention, ratio, beta):
    """Outputs of one clip with official counts, as {place: feature}."""
    places = x.shape[1]
    cosine = previous_cosine(x[None])[0]
    outputs = {}
    for start, end in static_windows(cosine > 0.8, 1024).spans:
        still = [
            p for p in range(places) if end > start and bool((cosine[start:end, p] > 0.8).all())
        ]
        for t in range(start, end + 1):
            moving = [p for p in range(places) if p not in still]
            count = -int(-len(moving) * ratio // 1)
            ranked = sorted(moving, key=lambda p: (-float(attention[t, p]), p))
            outputs |= {t * places + p: x[t, p].double() for p in ranked[:count]}
        count = round(len(still) * ratio)
        if not count:
            continue
        means = x[start : end + 1, still].double().mean(0)
        peaks = density_peaks(means[None].float(), torch.tensor([count]))
        for c in peaks.centres[0].nonzero().flatten().tolist():
            others = (peaks.centre_of[0] == c).nonzero().flatten().tolist()
            others.remove(c)
            feature = means[c]
            if others:
                feature = beta * feature + (1 - beta) * means[others].mean(0)
            outputs[start * places + still[c]] = feature
    return outputs


@quick
@given(clips(max_frames=6, batches=1), st.integers(0, 100), st.sampled_from([0.25, 0.5, 0.75]))
def test_oracle(clip, seed, ratio):
    shape = clip.features.shape[:3]
    attention = peaked(shape, seed)
    tokens = clip.tokens(class_attention=attention)
    reduction = HoliTom(keep_ratio=ratio, official=True)
    wanted = slow(clip.features[0], attention[0], ratio, 0.6)
    if not wanted or reduction.reason_to_keep_all(tokens.count):
        return
    got = reduction(tokens)
    assert got.positions[0].tolist() == sorted(wanted)
    features = torch.stack([wanted[n] for n in sorted(wanted)])
    torch.testing.assert_close(got.features[0].double(), features, rtol=1e-4, atol=1e-5)


def test_chains_dissolve_for_a_large_budget():
    clip = structured_clip(1, (6, 4, 4), 16, change=0.05)
    tokens = clip.tokens(class_attention=torch.rand(1, 6, 16))
    merged = HoliTom(keep=30)(tokens)
    assert int(merged.group_sizes().amax()) > 1
    large = HoliTom(keep=95)(tokens)
    assert large.kept == 95
    # At most the still places of one chain are given up beyond what is needed.
    assert int((large.group_sizes() > 1).sum()) <= 1


def test_moving_tokens_are_ranked_by_attention():
    features = torch.randn(1, 3, 9, 16, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 3, 9, generator=torch.Generator().manual_seed(1))
    clip = structured_clip(1, (3, 3, 3), 16)._replace(features=features)
    kept = HoliTom(keep=9)(clip.tokens(class_attention=attention)).positions[0]
    best = attention[0].topk(3, dim=1).indices.sort(dim=1).values
    assert kept.tolist() == (best + torch.tensor([[0], [9], [18]])).flatten().tolist()


def test_official_counts_may_keep_nothing():
    still = structured_clip(1, (6, 2, 2), 8)
    still = still._replace(features=still.features[:, :1].expand(1, 6, 4, 8))
    with pytest.raises(TokensError, match="keeps none"):
        HoliTom(keep_ratio=0.1, official=True)(still.tokens(class_attention=torch.rand(1, 6, 4)))


def test_options():
    assert HoliTom(keep_ratio=0.2, official=True).count_class == "adaptive"
    for options in ({"tau": 2}, {"beta": -1}, {"max_window": 0}, {"neighbors": 0}):
        with pytest.raises(PipelineError, match=next(iter(options))):
            HoliTom(keep=3, **options)
