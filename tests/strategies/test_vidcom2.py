"""VidCom2: an oracle in the notation of the paper."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.vidcom2 import VidCom2, commonness


def slow(x):
    """Scores and frame weights of one clip ``(T, P, D)``."""
    frames, places, channels = x.shape
    x = x.double()
    variance = [float(x[..., c].var(correction=0)) for c in range(channels)]
    order = sorted(range(channels), key=lambda c: variance[c])
    quiet = sorted(order[: max(1, channels // 2)])
    u = torch.nn.functional.normalize(x[..., quiet], dim=-1)

    def similarity(one, centre):
        d = float((one - centre).square().sum())
        return sum(math.exp(-d / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    video = u.reshape(-1, len(quiet)).mean(0)
    to_video = [[similarity(u[t, p], video) for p in range(places)] for t in range(frames)]
    to_frame = [[similarity(u[t, p], u[t].mean(0)) for p in range(places)] for t in range(frames)]
    logits = [-sum(row) / places / 0.01 for row in to_video]
    weights = [math.exp(v - max(logits)) for v in logits]
    p = [w / sum(weights) for w in weights]
    return torch.tensor(to_video) + torch.tensor(to_frame), [1 + v - 1 / frames for v in p]


@quick
@given(clips(min_channels=6))
def test_oracle(clip):
    usual = commonness(clip.features)
    for b, item in enumerate(clip.features):
        scores, deserves = slow(item)
        torch.testing.assert_close(usual.tokens[b], scores.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(usual.frames[b], torch.tensor(deserves), rtol=1e-2, atol=1e-2)


@quick
@given(st.integers(0, 50), st.floats(0.05, 0.9))
def test_kept_tokens_are_the_least_usual_of_their_frame(seed, ratio):
    clip = structured_clip(1, (6, 4, 4), 16, seed=seed)
    kept = VidCom2(keep_ratio=ratio)(clip.tokens()).positions[0].tolist()
    scores = commonness(clip.features).tokens[0].tolist()
    for t, row in enumerate(scores):
        mine = [n % 16 for n in kept if n // 16 == t]
        assert mine == sorted(sorted(range(16), key=lambda p: row[p])[: len(mine)])


@quick
@given(st.integers(0, 50))
def test_beside_a_loud_channel_the_quiet_half_is_still_found(seed):
    clip = structured_clip(1, (3, 3, 3), 12, seed=seed)
    # A step too small to see beside the first channel, as loud ones of real encoders are.
    clip.features[0] *= 1 + 1e-3 * torch.arange(12)
    clip.features[0, ..., 0] *= 1e4
    scores, _ = slow(clip.features[0])
    torch.testing.assert_close(
        commonness(clip.features).tokens[0], scores.float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("places", [20, 60, 140])
def test_official_shares_of_half_a_token(places):
    # One frame is unlike all others and takes the whole bonus: the others deserve 1 - 1 / T.
    generator = torch.Generator().manual_seed(places)
    still = 1 + 0.3 * torch.randn(1, 1, places, 16, generator=generator)
    still = still.expand(1, 12, places, 16).clone()
    still += 0.01 * torch.randn(still.shape, generator=generator)
    still[0, 5] *= -1
    usual = commonness(still)
    scales = 0.1 * (1 + torch.eye(12)[5] - torch.eye(12)[5].mean())
    torch.testing.assert_close(0.1 * usual.frames[0], scales, rtol=0, atol=0)
    tokens = VisualTokens.from_grid(still.flatten(1, 2), (12, 1, places))
    kept = VidCom2(keep_ratio=0.1, official=True)(tokens).positions[0] // places
    assert torch.equal(torch.bincount(kept, minlength=12), (scales * places).round().long())


def test_unusual_frames_keep_more():
    clip = structured_clip(1, (8, 6, 6), 16, change=0.05)
    clip.features[0, 3] = torch.randn(36, 16, generator=torch.Generator().manual_seed(9))
    kept = VidCom2(keep=72)(clip.tokens()).positions[0] // 36
    counts = torch.bincount(kept, minlength=8)
    assert int(counts.argmax()) == 3


def test_still_frames_share_alike():
    clip = structured_clip(1, (1, 4, 4), 16)
    still = clip._replace(features=clip.features.expand(1, 6, 16, 16), grid=(6, 4, 4))
    kept = VidCom2(keep=26)(still.tokens()).positions[0] // 16
    assert torch.bincount(kept).tolist() == [5, 5, 4, 4, 4, 4]


def test_official_counts_depend_on_the_data():
    tokens = structured_clip(1, (7, 5, 5), 16).tokens()
    strategy = VidCom2(keep_ratio=0.15, official=True)
    assert strategy.count_class == "adaptive"
    assert abs(strategy(tokens).kept - VidCom2(keep_ratio=0.15)(tokens).kept) <= 7
