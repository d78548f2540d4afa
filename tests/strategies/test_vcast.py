"""V-CAST: an oracle in the notation of its description."""

import torch
from hypothesis import given

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.ops import unit_vectors
from tokenreduce_strategies.vcast import VCAST, curvature, salience


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
            bend = e[min(t + 1, frames - 1)] - 2 * e[t] + e[max(t - 1, 0)]
            assert abs(float(bends[b, t]) - float(bend.norm())) < 1e-4
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


def test_frames_at_a_cut_keep_more():
    clip = structured_clip(1, (8, 6, 6), 16, change=0.05)
    counts = torch.bincount(VCAST(keep=72)(clip.tokens()).positions[0] // 36)
    # The scene changes between frames 3 and 4.
    assert counts[3:5].min() > torch.cat([counts[:3], counts[5:]]).max()


def test_still_frames_share_alike():
    clip = structured_clip(1, (1, 4, 4), 16)
    still = clip._replace(features=clip.features.expand(1, 6, 16, 16), grid=(6, 4, 4))
    counts = torch.bincount(VCAST(keep=26)(still.tokens()).positions[0] // 16)
    assert counts.tolist() == [5, 5, 4, 4, 4, 4]
