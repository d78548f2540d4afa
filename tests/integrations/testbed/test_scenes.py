"""Scenes are reproducible, and every answer follows from the objects."""

import re
from collections import Counter

import numpy as np
import pytest

from tokenreduce_integrations.testbed.scenes import (
    IMAGE_SIZE,
    QUESTION_TYPES,
    TRAINING_TYPES,
    Question,
    Scene,
    SceneGenerator,
    load_digits,
)
from tokenreduce_integrations.testbed.vocabulary import (
    BACKGROUNDS,
    COLORS,
    PLURALS,
    RELATIONS,
    TOKEN_IDS,
    WORDS,
)

SCENES = [SceneGenerator(11).scene(index) for index in range(150)]


def test_equal_seeds_give_equal_scenes_and_questions() -> None:
    first, second = SceneGenerator(5), SceneGenerator(5)
    for _ in range(5):
        one, other = first.sample(), second.sample()
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.patch_labels, other.patch_labels)
        assert one.objects == other.objects
        assert first.questions(one) == second.questions(other) == first.questions(other)


def test_sample_walks_through_the_indexed_scenes() -> None:
    generator = SceneGenerator(5)
    for index in range(3):
        sampled = generator.sample()
        np.testing.assert_array_equal(sampled.image, SceneGenerator(5).scene(index).image)


@pytest.mark.parametrize("other", [SceneGenerator(6), SceneGenerator(5, "train")])
def test_other_seeds_and_splits_give_other_scenes(other: SceneGenerator) -> None:
    assert not np.array_equal(other.scene(0).image, SceneGenerator(5).scene(0).image)


def test_image_and_labels_have_the_documented_form() -> None:
    for scene in SCENES[:20]:
        assert scene.image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert scene.image.dtype == np.uint8
        assert scene.patch_labels.shape == (144,)
        assert scene.background in BACKGROUNDS
        covered = np.count_nonzero(scene.patch_labels)
        assert 0 < covered < 72


def test_digits_of_the_splits_are_disjoint() -> None:
    train = {image.tobytes() for image in load_digits("train")[0]}
    test = {image.tobytes() for image in load_digits("test")[0]}
    assert len(load_digits("train")[1]) == 1300
    assert len(load_digits("test")[1]) == 497
    assert not train & test


@pytest.mark.parametrize("types", [QUESTION_TYPES, dict.fromkeys(TRAINING_TYPES, 1.0)])
def test_questions_of_a_scene_are_distinct(types: tuple[str, ...] | dict[str, float]) -> None:
    for scene in SCENES:
        texts = [question.text for question in SceneGenerator(11).questions(scene, 8, types)]
        assert len(texts) == len(set(texts))
        assert 4 <= len(texts) <= 8


def test_every_type_is_asked_and_every_word_is_known() -> None:
    asked: Counter[str] = Counter()
    for scene in SCENES:
        for question in SceneGenerator(11).questions(scene, 8, dict.fromkeys(TRAINING_TYPES, 1.0)):
            asked[question.type] += 1
            assert set(question.text.split()) | {question.answer} <= set(WORDS)
    assert set(asked) == set(TRAINING_TYPES)
    assert len(TOKEN_IDS) == len(WORDS)


def test_answers_follow_from_the_objects() -> None:
    for scene in SCENES:
        for question in SceneGenerator(11).questions(scene, 8, dict.fromkeys(TRAINING_TYPES, 1.0)):
            assert question.answer == expected_answer(scene, question), (question, scene.objects)


def test_unknown_types_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown question types"):
        SceneGenerator(11).questions(SCENES[0], types=["colour"])
    with pytest.raises(ValueError, match="split"):
        SceneGenerator(11, "validation")  # type: ignore[arg-type]


def expected_answer(scene: Scene, question: Question) -> str:
    """Answer a question from its words and the objects alone."""
    text = question.text
    shapes = [item for item in scene.objects if item.digit is None]
    named = [item for item in shapes if item.shape in text.split()]
    match question.type:
        case "color":
            assert len(named) == 1
            return named[0].color
        case "shape":
            return next(item.shape for item in shapes if item.color in text.split())
        case "count":
            singular = {plural: shape for shape, plural in PLURALS.items()}
            word = text.split()[2]
            key = singular.get(word, word)
            return str(sum(key in (item.shape, item.color) for item in shapes))
        case "exist":
            color, shape = text.split()[3:5]
            assert color in COLORS
            found = any((item.color, item.shape) == (color, shape) for item in shapes)
            return "yes" if found else "no"
        case "rel":
            pattern = rf"is the (\w+) ({'|'.join(RELATIONS)}) the (\w+) \?"
            match = re.fullmatch(pattern, text)
            assert match is not None
            (first,) = [item for item in shapes if item.shape == match[1]]
            (second,) = [item for item in shapes if item.shape == match[3]]
            holds = {
                "left of": first.x < second.x,
                "right of": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
            }
            return "yes" if holds[match[2]] else "no"
        case "where":
            assert len(named) == 1
            vertical = "top" if named[0].y < IMAGE_SIZE / 2 else "bottom"
            return vertical + ("left" if named[0].x < IMAGE_SIZE / 2 else "right")
        case "digit":
            return next(str(item.digit) for item in scene.objects if item.digit is not None)
        case "background":
            return scene.background
        case "row":
            return str(named[0].y // 16)
        case _:
            return str(named[0].x // 16)
