"""FastVID: an oracle in the notation of its description."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, peaked, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.frames import segment_lengths
from tokenreduce_strategies.fastvid import FastVID

TIE = 2.5e-7


def slow(x, attention, strategy, k):
    """Members and feature of each output, by place."""
    places = x.shape[1]
    lengths = segment_lengths(x.mean(1), strategy.segment_threshold, strategy.min_segments)
    salient_counts, anchor_counts = strategy.shares(lengths, places, k)
    flat = x.flatten(0, 1).double()
    unit = torch.nn.functional.normalize(flat, dim=1, eps=1e-8)
    outputs, start = {}, 0
    for length in lengths:
        salient, anchors = [], []
        for t in range(start, start + length):
            ranked = sorted(range(places), key=lambda p: (-float(attention[t, p]), p))
            mine = ranked[: salient_counts[t]]
            salient += [t * places + p for p in mine]
            free = sorted(set(range(places)) - set(mine))
            if anchor_counts[t]:
                peaks = density_peaks(x[t, free][None], torch.tensor([anchor_counts[t]]))
                anchors += [t * places + p for p in torch.tensor(free)[peaks.centres[0]].tolist()]
        joined = {anchor: [] for anchor in anchors}
        for n in range(start * places, (start + length) * places):
            if n in salient or n in anchors or not anchors:
                continue
            cosine = {anchor: float(unit[n] @ unit[anchor]) for anchor in anchors}
            joined[next(a for a, c in cosine.items() if c >= max(cosine.values()) - TIE)].append(n)
        outputs |= {n: ([n], flat[n]) for n in salient}
        for anchor, others in joined.items():
            feature = flat[anchor]
            if others:
                mean = flat[others].mean(0)
                feature = strategy.beta * feature + (1 - strategy.beta) * mean
            outputs[anchor] = ([anchor, *others], feature)
        start += length
    return outputs


@quick
@given(clips(max_frames=6, max_side=3, batches=1), st.data())
def test_oracle(clip, data):
    shape = clip.features.shape[:3]
    k = data.draw(st.integers(1, shape[1] * shape[2]))
    if k == shape[1] * shape[2]:
        return
    seed = data.draw(st.integers(0, 100))
    attention = peaked(shape, seed)
    strategy = FastVID(keep=k, min_segments=data.draw(st.integers(1, 3)), interval=2)
    reduction = strategy(clip.tokens(class_attention=attention))
    outputs = slow(clip.features[0], attention[0], strategy, k)
    assert reduction.positions[0].tolist() == sorted(outputs)
    for m, place in enumerate(sorted(outputs)):
        members, feature = outputs[place]
        assert (reduction.assignment[0] == m).nonzero().flatten().tolist() == sorted(members)
        torch.testing.assert_close(reduction.features[0, m].double(), feature, rtol=1e-4, atol=1e-5)


def test_shares():
    # Of 20 tokens, 8 are anchors: those of 10 in each segment, in its first frame.
    salient, anchors = FastVID(keep=20).shares([4, 4], 9, 20)
    assert salient == [1, 2, 1, 2, 1, 2, 1, 2]
    assert anchors == [4, 0, 0, 0, 4, 0, 0, 0]
    # Too many for every fourth frame.
    _, anchors = FastVID(keep=30).shares([4], 9, 30)
    assert anchors == [3, 3, 3, 3]
    assert FastVID(keep=3, context=0).shares([2, 2], 9, 3) == ([0, 1, 1, 1], [0, 0, 0, 0])


def test_salient_tokens_are_kept_as_they_are():
    clip = structured_clip(1, (4, 4, 4), 16)
    attention = torch.full((1, 4, 16), 0.01)
    attention[..., 5] = 1
    reduction = FastVID(keep=16)(clip.tokens(class_attention=attention))
    for t in range(4):
        output = int((reduction.positions[0] == t * 16 + 5).nonzero())
        assert torch.equal(reduction.features[0, output], clip.features[0, t, 5])


@pytest.mark.parametrize(
    "options",
    [
        {"segment_threshold": 2},
        {"min_segments": 0},
        {"interval": 0},
        {"context": 1.5},
        {"beta": 0},
    ],
)
def test_options(options):
    with pytest.raises(PipelineError, match=next(iter(options))):
        FastVID(keep=4, **options)
