"""EVS: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.evs import EVS
from tokenreduce_strategies.uniform import Uniform

TIE = 2.5e-7


def slow(x, k):
    """Retention by dissimilarity to the frame before; frame 0 has the largest of all."""
    frames, places = x.shape[:2]
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    novelty = [255.0] * places
    for t in range(1, frames):
        novelty += [1 - float(unit[t, p] @ unit[t - 1, p]) for p in range(places)]
    threshold = sorted(novelty, reverse=True)[k - 1]
    surely = [n for n, v in enumerate(novelty) if v > threshold + TIE]
    near = [n for n, v in enumerate(novelty) if abs(v - threshold) <= TIE]
    return sorted(surely + near[: k - len(surely)])


@quick
@given(clips(), st.data())
def test_oracle(clip, data):
    frames, height, width = clip.grid
    n, places = frames * height * width, height * width
    k = data.draw(st.integers(places, n))
    kept = EVS(keep=k)(clip.tokens()).positions
    assert kept.tolist() == [slow(item, k) for item in clip.features]


def test_less_than_a_frame():
    clip = structured_clip(2, (4, 4, 6), 8)
    kept = EVS(keep=6)(clip.tokens()).positions
    image = VisualTokens.from_grid(clip.features[:, 0], (4, 6))
    assert kept.equal(Uniform(keep=6)(image).positions)


@pytest.mark.parametrize(("ratio", "kept"), [(0.1, 24), (0.2, 24), (0.5, 48), (0.3, 28)])
def test_official_counts(ratio, kept):
    tokens = structured_clip(1, (4, 4, 6), 8).tokens()
    strategy = EVS(keep_ratio=ratio, official=True)
    assert strategy(tokens).kept == kept
    assert strategy.count_class == "layout"
    assert EVS(keep_ratio=ratio)(tokens).kept == round(96 * ratio)


def test_a_still_clip_is_its_first_frame():
    frame = torch.randn(1, 1, 24, 16, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.from_grid(frame.expand(1, 5, 24, 16).flatten(1, 2), (5, 4, 6))
    assert EVS(keep=24)(tokens).positions[0].tolist() == list(range(24))
