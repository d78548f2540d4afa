"""DyCoke: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.dycoke import DyCoke, shared_counts

TIE = 2.5e-7


def least_similar(x, reference, count):
    """Places of the ``count`` tokens of a frame that differ most from the reference frame."""
    unit = torch.nn.functional.normalize(torch.stack([x, reference]).double(), dim=-1)
    similarity = [float(unit[0, p] @ unit[1, p]) for p in range(len(x))]
    threshold = sorted([*similarity, 9.0])[count - 1] if count else -9.0
    surely = [p for p, s in enumerate(similarity) if s < threshold - TIE]
    near = [p for p, s in enumerate(similarity) if abs(s - threshold) <= TIE]
    return sorted(surely + near[: count - len(surely)])


def slow(x, k):
    """Temporal merging of groups of four, of the anchors where the budget holds no more."""
    frames, places = x.shape[:2]
    clip = list(range(frames))
    while len(clip[::4]) * places > k:
        clip = clip[::4]
    anchors = clip[::4]
    others = [t for t in clip if t not in anchors]
    left = k - len(anchors) * places
    kept = [t * places + p for t in anchors for p in range(places)]
    for rank, t in enumerate(others):
        count = left // len(others) + (rank < left % len(others))
        i = clip.index(t)
        reference = clip[i - 2 if i % 4 == 2 else i - 1]
        kept += [t * places + p for p in least_similar(x[t], x[reference], count)]
    return sorted(kept)


@quick
@given(clips(max_frames=18, max_side=3), st.data())
def test_oracle(clip, data):
    frames, height, width = clip.grid
    k = data.draw(st.integers(height * width, frames * height * width))
    kept = DyCoke(keep=k)(clip.tokens()).positions
    assert kept.tolist() == [slow(item, k) for item in clip.features]


def test_shares():
    assert shared_counts(8, 10, 44) == ([10, 4, 4, 4, 10, 4, 4, 4], 1)
    assert shared_counts(5, 10, 22) == ([10, 1, 1, 0, 10], 1)
    # Nine anchors of 36 frames do not fit: groups of every fourth frame.
    counts, stride = shared_counts(36, 10, 42)
    assert stride == 4
    assert [counts[t] for t in range(0, 36, 4)] == [10, 2, 2, 2, 10, 2, 2, 2, 10]
    assert sum(counts) == 42


@pytest.mark.parametrize(("frames", "whole"), [(8, 3), (16, 5), (5, 1), (6, 2)])
def test_official_counts(frames, whole):
    # Anchors; the third frame of a last group of four; and not the last of an odd number.
    pruned = frames // 2 * 2 - whole
    strategy = DyCoke(official=True)
    assert strategy.count_class == "layout"
    reduction = strategy(structured_clip(1, (frames, 14, 14), 8).tokens())
    assert reduction.kept == whole * 196 + pruned * 58


def test_options():
    tokens = structured_clip(1, (4, 2, 2), 8).tokens()
    with pytest.raises(TokensError, match="at least 5 frames"):
        DyCoke(official=True)(tokens)
    with pytest.raises(PipelineError, match="count follows from merging_ratio"):
        DyCoke(official=True, keep=4)
    with pytest.raises(PipelineError, match="official=True alone"):
        DyCoke(merging_ratio=0.5, keep=4)
    with pytest.raises(PipelineError, match=r"\(0, 1\)"):
        DyCoke(merging_ratio=1.0, official=True)
