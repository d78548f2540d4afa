"""Accuracy of an unreduced model on held-out scenes or clips."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from losses import normalise
from transformers import (
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)

from tokenreduce_integrations.testbed import packed
from tokenreduce_integrations.testbed.clips import CLIP_QUESTION_TYPES
from tokenreduce_integrations.testbed.evaluation import (
    Bootstrap,
    answer_questions,
    encode_clips,
)
from tokenreduce_integrations.testbed.scenes import QUESTION_TYPES, SceneGenerator

BATCH_SIZE = 50


@dataclass(frozen=True)
class TypeResult:
    """Result of one question type.

    Attributes:
        accuracy: Fraction of the answers that are right.
        majority: Fraction that the most frequent answer would get right.
        questions: Number of questions.
    """

    accuracy: float
    majority: float
    questions: int


@torch.no_grad()
def evaluate(model: LlavaForConditionalGeneration, seed: int, images: int) -> dict[str, TypeResult]:
    """Ask eight distinct questions about each held-out scene of a seed."""
    generator = SceneGenerator(seed, "test")
    right: dict[str, list[bool]] = defaultdict(list)
    truth: dict[str, Counter[str]] = defaultdict(Counter)
    for start in range(0, images, BATCH_SIZE):
        scenes = [generator.scene(i) for i in range(start, min(start + BATCH_SIZE, images))]
        asked = [generator.questions(scene) for scene in scenes]
        pixels = normalise(torch.from_numpy(np.stack([scene.image for scene in scenes])))
        features = model.get_image_features(pixels).pooler_output
        given = packed.answer(
            model,
            torch.stack(list(features)),
            packed.image_positions(len(scenes)),
            [[question.text for question in row] for row in asked],
        )
        for questions, answers in zip(asked, given, strict=True):
            for question, answer in zip(questions, answers, strict=True):
                right[question.type].append(answer == question.answer)
                truth[question.type][question.answer] += 1
    return {
        name: TypeResult(
            float(np.mean(right[name])),
            max(truth[name].values()) / truth[name].total(),
            len(right[name]),
        )
        for name in QUESTION_TYPES
    }


def evaluate_clips(
    model: LlavaOnevisionForConditionalGeneration,
    processor: LlavaOnevisionProcessor,
    seed: int,
    clips: int,
) -> dict[str, TypeResult]:
    """Ask eight distinct questions about each held-out clip of a seed."""
    encoded = encode_clips(model, processor, seed=seed, clips=clips, types=CLIP_QUESTION_TYPES)
    accuracy = Bootstrap(encoded, resamples=1).by_type(answer_questions(model, encoded))
    truth: dict[str, Counter[str]] = defaultdict(Counter)
    for row in encoded.questions:
        for question in row:
            truth[question.type][question.answer] += 1
    return {
        name: TypeResult(
            accuracy[name],
            max(truth[name].values()) / truth[name].total(),
            truth[name].total(),
        )
        for name in CLIP_QUESTION_TYPES
    }


def macro(results: dict[str, TypeResult], types: Sequence[str] = QUESTION_TYPES) -> float:
    """Mean accuracy over question types."""
    return float(np.mean([results[name].accuracy for name in types]))
