"""Training batches: images, questions and the targets of the auxiliary losses."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenreduce_integrations.testbed.scenes import (
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    Question,
    Scene,
    SceneGenerator,
)
from tokenreduce_integrations.testbed.vocabulary import (
    BACKGROUNDS,
    COLORS,
    EOS,
    PAD,
    SHAPES,
    TOKEN_IDS,
    encode_turn,
)

QUESTIONS = 8
QUESTION_WIDTH = 11
"""Tokens of the longest question with its answer."""
IGNORED = -100

QUERIES = len(SHAPES) * len(COLORS) + len(SHAPES) + len(COLORS) + 1
"""Things a caption query can ask for: each pair, each shape, each colour, and the digit."""
TAGS = len(SHAPES) * len(COLORS) + 10 + len(BACKGROUNDS) + 6 * (len(SHAPES) + len(COLORS))
"""Image-level facts; see `scene_tags`."""


@dataclass
class Batch:
    """Tensors of a batch of B scenes.

    Attributes:
        images: uint8 ``(B, 96, 96, 3)``.
        patch_labels: int64 ``(B, 144)``.
        centre_patches: Patches at the centre of an object, bool ``(B, 144)``.
        tags: Image-level facts, 0 or 1, float32 ``(B, TAGS)``.
        query_counts: Objects that match each query, int64 ``(B, QUERIES)``.
        query_centres: Centre ``(x, y)`` in -1..1 of each query's object, NaN unless there is
            exactly one, float32 ``(B, QUERIES, 2)``.
        query_kinds: Shape, colour and digit of each query's object, `IGNORED` unless there is
            exactly one and it has that property, int64 ``(B, QUERIES, 3)``.
        backgrounds: int64 ``(B,)``.
        input_ids: Questions with their answers, int64 ``(B, 8, 11)``.
        targets: The next token where it is part of an answer, else `IGNORED`, same shape.
        word_centres: Centre ``(x, y)`` in -1..1 of the object that a shape or colour word of a
            question names, NaN for other words and unless there is exactly one such object,
            float32 ``(B, 8, 11, 2)``.
    """

    images: Tensor
    patch_labels: Tensor
    centre_patches: Tensor
    tags: Tensor
    query_counts: Tensor
    query_centres: Tensor
    query_kinds: Tensor
    backgrounds: Tensor
    input_ids: Tensor
    targets: Tensor
    word_centres: Tensor


def make_batch(
    generator: SceneGenerator, start: int, size: int, types: Mapping[str, float]
) -> Batch:
    """Render the scenes ``start`` to ``start + size`` of a generator, with questions."""
    scenes = [generator.scene(start + i) for i in range(size)]
    questions = [generator.questions(scene, QUESTIONS, types) for scene in scenes]
    input_ids, targets = zip(*map(encode_answers, questions), strict=True)
    queries = [scene_queries(scene) for scene in scenes]
    counts, centres, kinds = (np.stack(part) for part in zip(*queries, strict=True))
    return Batch(
        images=torch.from_numpy(np.stack([scene.image for scene in scenes])),
        patch_labels=torch.from_numpy(np.stack([scene.patch_labels for scene in scenes])),
        centre_patches=torch.from_numpy(np.stack([centre_patches(scene) for scene in scenes])),
        tags=torch.from_numpy(np.stack([scene_tags(scene) for scene in scenes])),
        query_counts=torch.from_numpy(counts),
        query_centres=torch.from_numpy(centres),
        query_kinds=torch.from_numpy(kinds),
        backgrounds=torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
        input_ids=torch.from_numpy(np.stack(input_ids)),
        targets=torch.from_numpy(np.stack(targets)),
        word_centres=torch.from_numpy(
            np.stack(
                [
                    word_centres(ids, answers, centre)
                    for ids, answers, centre in zip(input_ids, targets, centres, strict=True)
                ]
            )
        ),
    )


def encode_answers(questions: list[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and targets of up to eight questions, both int64 ``(8, 11)``."""
    input_ids = np.full((QUESTIONS, QUESTION_WIDTH), TOKEN_IDS[PAD])
    targets = np.full((QUESTIONS, QUESTION_WIDTH), IGNORED)
    for row, question in enumerate(questions):
        turn = encode_turn(question.text)
        answer = TOKEN_IDS[question.answer]
        input_ids[row, : len(turn) + 1] = [*turn, answer]
        targets[row, len(turn) - 1 : len(turn) + 1] = (answer, TOKEN_IDS[EOS])
    return input_ids, targets


def word_centres(input_ids: np.ndarray, targets: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Centres of the objects that the words of a question name, float32 ``(8, 11, 2)``.

    Args:
        input_ids: Questions with their answers, ``(8, 11)``.
        targets: The next token inside an answer, ``(8, 11)``.
        centres: Centres of the caption queries, ``(QUERIES, 2)``.
    """
    by_token = np.full((len(TOKEN_IDS), 2), np.nan, np.float32)
    names = [TOKEN_IDS[name] for name in (*SHAPES, *COLORS)]
    by_token[names] = centres[-1 - len(names) : -1]
    found = by_token[input_ids]
    found[targets == TOKEN_IDS[EOS]] = np.nan  # the answer itself
    return found


def scene_tags(scene: Scene) -> np.ndarray:
    """Facts that a caption would state, float32 ``(TAGS,)``.

    Which shapes occur in which colour; the digit; the background; and for every shape and colour
    its quadrants, and whether there are at least two or three of it.
    """
    pairs = np.zeros((len(SHAPES), len(COLORS)), np.float32)
    digits = np.zeros(10, np.float32)
    quadrants = np.zeros((len(SHAPES) + len(COLORS), 4), np.float32)
    numbers = np.zeros(len(SHAPES) + len(COLORS))
    for item in scene.objects:
        if item.digit is not None:
            digits[item.digit] = 1
            continue
        shape, color = SHAPES.index(item.shape), COLORS.index(item.color)
        pairs[shape, color] = 1
        rows = [shape, len(SHAPES) + color]
        quadrants[rows, 2 * (item.y > IMAGE_SIZE / 2) + (item.x > IMAGE_SIZE / 2)] = 1
        numbers[rows] += 1
    background = np.array([scene.background == name for name in BACKGROUNDS], np.float32)
    several = np.stack([numbers >= 2, numbers >= 3]).astype(np.float32)
    parts = (pairs, digits, background, quadrants, several)
    return np.concatenate([part.ravel() for part in parts])


def centre_patches(scene: Scene) -> np.ndarray:
    """Patches at the centre of an object, bool ``(144,)``."""
    marked = np.zeros((GRID_SIZE, GRID_SIZE), bool)
    for item in scene.objects:
        marked[int(item.y) // PATCH_SIZE, int(item.x) // PATCH_SIZE] = True
    return marked.ravel()


def scene_queries(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, centres and kinds of every caption query; see `Batch`."""
    matches: list[list[int]] = [[] for _ in range(QUERIES)]
    pairs = len(SHAPES) * len(COLORS)
    for index, item in enumerate(scene.objects):
        if item.digit is not None:
            matches[-1].append(index)
            continue
        shape, color = SHAPES.index(item.shape), COLORS.index(item.color)
        matches[shape * len(COLORS) + color].append(index)
        matches[pairs + shape].append(index)
        matches[pairs + len(SHAPES) + color].append(index)
    counts = np.array([len(found) for found in matches])
    centres = np.full((QUERIES, 2), np.nan, np.float32)
    kinds = np.full((QUERIES, 3), IGNORED)
    for query, found in enumerate(matches):
        if len(found) != 1:
            continue
        item = scene.objects[found[0]]
        centres[query] = (2 * item.x / IMAGE_SIZE - 1, 2 * item.y / IMAGE_SIZE - 1)
        if item.digit is not None:
            kinds[query, 2] = item.digit
        else:
            kinds[query, :2] = SHAPES.index(item.shape), COLORS.index(item.color)
    return counts, centres, kinds
