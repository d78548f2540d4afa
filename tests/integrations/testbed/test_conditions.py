"""Conditions change how a clip looks by as much as they say, and never what happens in it."""

import hashlib
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from tokenreduce_integrations.testbed.clips import FRAMES, Clip, ClipGenerator
from tokenreduce_integrations.testbed.conditions import Conditions

CONDITIONS = [
    Conditions(noise=20),
    Conditions(flicker=0.3),
    Conditions(shake=2),
    Conditions(pan=1.5),
    Conditions(ripple=3),
    Conditions(bars=4),
    Conditions(noise=5, flicker=0.1, shake=1, pan=1, ripple=2, bars=2),
]


def clip_under(conditions: Conditions, index: int = 0) -> Clip:
    return ClipGenerator(17, conditions=conditions).clip(index)


@pytest.mark.parametrize("conditions", CONDITIONS, ids=str)
def test_the_same_happens_under_all_conditions(conditions: Conditions) -> None:
    generator = ClipGenerator(17, conditions=conditions)
    for index in range(4):
        still, other = clip_under(Conditions(), index), generator.clip(index)
        assert other.objects == still.objects
        assert other.background == still.background
        assert generator.questions(other) == ClipGenerator(17).questions(still)
        assert other.frames.dtype == still.frames.dtype
        assert other.frames.shape == still.frames.shape
        assert (other.frames != still.frames).any()
        np.testing.assert_array_equal(other.frames, clip_under(conditions, index).frames)


def test_without_conditions_clips_are_those_that_results_were_measured_on() -> None:
    frames = np.stack([ClipGenerator(30001).clip(index).frames for index in range(5)])
    digest = hashlib.sha256(frames.tobytes()).hexdigest()
    assert digest == "c87af95baa3cae8429ad5830c72c5968360d2fdcc185beeebfd14591a20261a3"


@pytest.mark.parametrize("conditions", [Conditions(shake=2), Conditions(pan=1)], ids=str)
def test_a_moving_camera_moves_all_alike(conditions: Conditions) -> None:
    still, filmed = clip_under(Conditions(), 1).frames, clip_under(conditions, 1).frames
    offsets = np.array([shift(one, other) for one, other in zip(still, filmed, strict=True)])
    assert 1 <= abs(offsets).max() <= 4
    if conditions.pan:
        steps = np.diff(offsets, axis=0)
        assert abs(steps).max() == 1
        assert (abs(steps.sum(0)) == abs(steps).sum(0)).all()


def test_the_camera_is_where_the_conditions_say() -> None:
    rng = np.random.default_rng(0)
    shaken = Conditions(shake=2).windows(rng, 500)
    assert set(shaken.ravel().tolist()) == {-2, -1, 0, 1, 2}
    panned = Conditions(pan=3).windows(rng, FRAMES)
    assert abs(np.hypot(*(panned[-1] - panned[0])) - 3 * (FRAMES - 1)) < 1.5
    np.testing.assert_array_equal(panned, -panned[::-1])
    assert not Conditions().windows(rng, FRAMES).any()


def test_a_ripple_displaces_the_background_along_columns() -> None:
    still = np.broadcast_to(np.arange(60, dtype=np.float32)[:, None, None], (60, 50, 3))
    ground = Conditions(ripple=3).ground(np.random.default_rng(0), still, FRAMES)
    displaced = (ground - still)[:, 3:-3]
    assert set(displaced.ravel().tolist()) == set(range(-3, 4))
    assert (displaced == displaced[:, :1]).all()
    assert (ground[1:] != ground[:-1]).any((1, 2, 3)).all()


def test_bars_pass_and_are_grey() -> None:
    still = np.full((96, 96, 3), -1, np.float32)
    ground = Conditions(bars=1).ground(np.random.default_rng(0), still, FRAMES)
    covered = ground[..., 0] >= 0
    assert (ground == ground[..., :1]).all()
    assert 12 <= covered.sum((1, 2)).max() <= 39
    assert (covered[1:] != covered[:-1]).any((1, 2)).sum() >= 3


def test_exposure_and_noise_are_of_the_strengths_asked_for() -> None:
    rng = np.random.default_rng(0)
    frames = np.full((200, 8, 8, 3), 100, np.float32)
    gains = Conditions(flicker=0.3).expose(rng, frames) / 100
    assert (gains == gains[:, :1, :1, :1]).all()
    assert 0.7 <= gains.min() < 0.75
    assert 1.25 < gains.max() <= 1.3
    noise = Conditions(noise=20).expose(rng, frames) - frames
    assert abs(noise.mean()) < 1
    assert abs(noise.std() - 20) < 1


@pytest.mark.parametrize("wrong", [{"noise": -1}, {"shake": -2}, {"flicker": 1.0}])
def test_impossible_conditions_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="conditions must not be negative"):
        Conditions(**wrong)  # type: ignore[arg-type]


def shift(still: NDArray[np.uint8], filmed: NDArray[np.uint8]) -> tuple[int, int]:
    """Offset ``(x, y)`` of the camera that makes one frame the other, away from the border."""
    inner = still[8:-8, 8:-8].astype(int)
    errors = {
        (x, y): abs(filmed[8 - y : 88 - y, 8 - x : 88 - x] - inner).mean()
        for x, y in product(range(-4, 5), repeat=2)
    }
    best = min(errors, key=errors.__getitem__)
    assert errors[best] < 12
    return best
