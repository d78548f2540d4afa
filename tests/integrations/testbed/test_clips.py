"""Clips are reproducible, and every answer follows from what the shapes do."""

from collections import Counter

import numpy as np
import pytest

from tokenreduce_integrations.testbed.clips import (
    CLIP_QUESTION_TYPES,
    FRAMES,
    MOTION_TYPES,
    Clip,
    ClipGenerator,
    ClipObject,
)
from tokenreduce_integrations.testbed.scenes import IMAGE_SIZE, Question
from tokenreduce_integrations.testbed.vocabulary import COLORS, PLURALS, QUADRANTS, SHAPES, WORDS

CLIPS = [ClipGenerator(11).clip(index) for index in range(80)]
AHEAD = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def test_equal_seeds_give_equal_clips_and_questions() -> None:
    first, second = ClipGenerator(5), ClipGenerator(5)
    for index in (3, 0):
        one, other = first.clip(index), second.clip(index)
        np.testing.assert_array_equal(one.frames, other.frames)
        assert one.objects == other.objects
        assert first.questions(one) == second.questions(other) == first.questions(other)


def test_splits_seeds_and_indices_differ() -> None:
    clips = [
        ClipGenerator(5).clip(0),
        ClipGenerator(5).clip(1),
        ClipGenerator(6).clip(0),
        ClipGenerator(5, "train").clip(0),
    ]
    assert len({clip.frames.tobytes() for clip in clips}) == len(clips)


def test_unknown_splits_and_types_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        ClipGenerator(0, "validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown question types"):
        ClipGenerator(0).questions(CLIPS[0], types=["digit"])


def test_shapes_stay_inside_and_apart() -> None:
    for clip in CLIPS:
        assert clip.frames.shape == (FRAMES, IMAGE_SIZE, IMAGE_SIZE, 3)
        taken = np.zeros((FRAMES, IMAGE_SIZE, IMAGE_SIZE), int)
        for item in clip.objects:
            for frame, (x, y) in enumerate(item.centres):
                low, high = (x - item.radius, y - item.radius), (x + item.radius, y + item.radius)
                assert min(low) >= 0
                assert max(high) < IMAGE_SIZE
                taken[frame, low[1] : high[1] + 1, low[0] : high[0] + 1] += 1
        assert taken.max() == 1


def test_one_shape_moves_at_a_time_along_its_direction() -> None:
    for clip in CLIPS:
        assert 1 <= len(clip.movers) <= 2
        steps = [moves(item) for item in clip.objects]
        assert all(sum(frame) <= 1 for frame in zip(*steps, strict=True))
        for item in clip.objects:
            start, end = np.array(item.centres[0]), np.array(item.centres[-1])
            if item.motion is None:
                assert set(item.centres) == {item.centres[0]}
            else:
                ahead = np.array(AHEAD[item.motion.direction])
                np.testing.assert_array_equal(end - start, ahead * item.motion.travel)


def test_the_background_stands_still_but_for_noise() -> None:
    for clip in CLIPS[:20]:
        untouched = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
        for item in clip.objects:
            for x, y in item.centres:
                box = np.s_[
                    y - item.radius : y + item.radius + 1, x - item.radius : x + item.radius + 1
                ]
                untouched[box] = False
        still = clip.frames[:, untouched].astype(int)
        assert abs(still - still.mean(0)).mean() < 10


def test_questions_are_distinct_and_their_answers_true() -> None:
    asked: Counter[str] = Counter()
    for clip in CLIPS:
        questions = ClipGenerator(11).questions(clip)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            asked[question.type] += 1
            assert set(question.text.split()) | {question.answer} <= set(WORDS)
            assert question.answer == true_answer(clip, question)
    assert set(asked) == set(CLIP_QUESTION_TYPES) >= set(MOTION_TYPES)


def moves(item: ClipObject) -> list[bool]:
    """Whether an object moves on the way to each frame after the first."""
    return [a != b for a, b in zip(item.centres, item.centres[1:], strict=False)]


def true_answer(clip: Clip, question: Question) -> str:
    """The answer, read off the objects' paths."""
    words = question.text.split()
    movers = [item for item in clip.objects if any(moves(item))]
    if question.type in ("moved", "order"):
        movers.sort(key=lambda item: moves(item).index(True))
        assert len(movers) == (1 if question.type == "moved" else 2)
        item = movers[-1 if "last" in words else 0]
        return item.shape if words[1] == "shape" else item.color
    if question.type == "background":
        return clip.background
    if question.type == "count":
        name = {plural: shape for shape, plural in PLURALS.items()}.get(words[2], words[2])
        return str(sum(name in (item.shape, item.color) for item in clip.objects))
    (named,) = set(words) & set(SHAPES)
    (item,) = (each for each in clip.objects if each.shape == named)
    if question.type == "moving":
        return "yes" if item in movers else "no"
    if question.type == "color":
        assert item.color in COLORS
        return item.color
    (x, y), (last_x, last_y) = item.centres[0], item.centres[-1]
    if question.type == "where":
        return QUADRANTS[2 * (y > IMAGE_SIZE / 2) + (x > IMAGE_SIZE / 2)]
    step = (np.sign(last_x - x), np.sign(last_y - y))
    return next(name for name, ahead in AHEAD.items() if ahead == step)
