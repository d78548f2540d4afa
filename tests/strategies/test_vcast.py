"""V-CAST: an oracle in the notation of its description."""

import pytest
import torch
from hypothesis import given

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError
from tokenreduce.ops import unit_vectors
from tokenreduce_strategies.vcast import VCAST, curvature, official_counts, salience


def unit(vector):
    return vector / vector.norm() if vector.norm() else vector


@quick
@given(clips())
def test_oracle(clip):
    x = clip.features.double()
    batch, frames, places, _ = x.shape
    units = unit_vectors(clip.features.mean(2))
    bends, scores = curvature(units), salience(clip.features, units)
    for b in range(batch):
        e = [unit(x[b, t].mean(0)) for t in range(frames)]
        for t in range(frames):
            bend = 1.0
            if 0 < t < frames - 1 and min((e[t] - e[t - 1]).norm(), (e[t + 1] - e[t]).norm()) > 0:
                bend -= float(unit(e[t] - e[t - 1]) @ unit(e[t + 1] - e[t]))
            assert abs(float(bends[b, t]) - bend) < 1e-3
            norms = [float(x[b, t, p].norm()) for p in range(places)]
            spread = max(norms) - min(norms)
            for p in range(places):
                energy = (norms[p] - min(norms)) / spread if spread > 1e-5 * max(norms) else 0
                score = 1 - float(unit(x[b, t, p]) @ e[t]) + energy
                assert abs(float(scores[b, t, p]) - score) < 1e-3


def test_kept_tokens_are_the_salient_ones_of_their_frame():
    clip = structured_clip(1, (6, 4, 4), 16)
    kept = VCAST(keep=24)(clip.tokens()).positions[0].tolist()
    scores = salience(clip.features, unit_vectors(clip.features.mean(2)))[0].tolist()
    for t, row in enumerate(scores):
        mine = [n % 16 for n in kept if n // 16 == t]
        assert mine == sorted(sorted(range(16), key=lambda p: -row[p])[: len(mine)])


def test_frames_where_the_video_turns_keep_more():
    # Frame means go one way up to frame 3, and then another one.
    way = torch.eye(16)[[0, 1]]
    path = torch.stack([torch.eye(16)[2] + min(t, 3) * way[0] * 0.1 for t in range(8)])
    path = path + torch.arange(8).sub(3).clamp(min=0)[:, None] * way[1] * 0.1
    clip = structured_clip(1, (8, 6, 6), 16, change=0.05)
    moving = clip.features - clip.features.mean(2, keepdim=True) + path[:, None]
    tokens = clip._replace(features=moving).tokens()
    counts = torch.bincount(VCAST(keep=72)(tokens).positions[0] // 36)
    assert counts[1:7].argmax() + 1 == 3


def test_still_frames_share_alike():
    clip = structured_clip(1, (1, 4, 4), 16)
    still = clip._replace(features=clip.features.expand(1, 6, 16, 16), grid=(6, 4, 4))
    counts = torch.bincount(VCAST(keep=26)(still.tokens()).positions[0] // 16)
    assert counts.tolist() == [5, 5, 4, 4, 4, 4]


def slow_official_counts(weights, k, places):
    """Grants one at a time, to the largest fraction of those with room."""
    exact = [w * (k - len(weights)) for w in weights]
    counts = [min(places, 1 + int(e)) for e in exact]
    fraction = [e - int(e) for e in exact]
    while sum(counts) < k:
        open_frames = [t for t in range(len(counts)) if counts[t] < places]
        counts[max(open_frames, key=lambda t: (fraction[t], -t))] += 1
    return counts


@pytest.mark.parametrize("k", [7, 20, 33, 60, 83])
def test_official_counts(k):
    generator = torch.Generator().manual_seed(k)
    weights = (3 * torch.randn(4, 7, generator=generator)).softmax(1)
    counts = official_counts(weights, k, 12)
    assert counts.tolist() == [slow_official_counts(row, k, 12) for row in weights.tolist()]


def test_official_rounding():
    tokens = structured_clip(1, (5, 3, 3), 8).tokens()
    # 45 x 0.5 is half way: to even there, up here.
    assert VCAST(keep_ratio=0.5, official=True)(tokens).kept == 22
    assert VCAST(keep_ratio=0.5)(tokens).kept == 23
    assert VCAST(keep=2, official=True)(tokens).kept == 5


def test_options():
    with pytest.raises(PipelineError, match="temperature"):
        VCAST(temperature=0.0)
