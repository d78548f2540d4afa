"""What a reduction costs: accuracy of a testbed model on held-out scenes, with intervals.

Scenes are encoded once, as projected features. A reducer turns the 144 features of each scene into
fewer, and the language model answers every question from those, each at its original position: what
an attachment at the ``projector`` site does, without repeating the vision encoder. Answers of
different strategies belong to the same questions, so that differences are paired.

The score is the macro average: accuracy by question type, averaged over the types that the model
has learned. No question occurs twice in a scene. Intervals come from a bootstrap that resamples
whole scenes, because questions about one scene are not independent.

    model, processor = load("b")
    encoded = encode_scenes(model, processor, seed=7, scenes=200, types=reported_types("b"))
    unreduced = answer_questions(model, encoded)
    reduced = answer_questions(model, encoded, tr.create_strategy("lftr", reduction=16))
    bootstrap = Bootstrap(encoded)
    print(bootstrap.macro(reduced), bootstrap.difference(reduced, unreduced))

Clips go the same way, with :func:`encode_clips` and the model that sees them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)

from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_integrations.evaluation import statistics
from tokenreduce_integrations.evaluation.schema import Estimate
from tokenreduce_integrations.evaluation.statistics import CONFIDENCE, RESAMPLES, Correct
from tokenreduce_integrations.transformers.layouts import pooled_frames
from tokenreduce_integrations.transformers.probes import TowerProbes, pools, towers

from . import packed
from .clips import ClipGenerator
from .conditions import Conditions
from .scenes import GRID_SIZE, Question, SceneGenerator

__all__ = [
    "CONFIDENCE",
    "RESAMPLES",
    "Bootstrap",
    "Correct",
    "EncodedScenes",
    "Estimate",
    "answer_questions",
    "encode_clips",
    "encode_scenes",
    "reduce_features",
]

GRID: Final = Layout.from_grid((GRID_SIZE, GRID_SIZE))
"""Where the tokens of a scene lie."""
PROBES: Final = TowerProbes(tower=towers.image_tower, pools={"video": pools.pooled_frames})
"""What reads signals while clips are encoded."""

BATCH_SIZE: Final = 50
"""Scenes that are encoded, reduced and answered at once."""
QUESTIONS: Final = 8
"""Most questions about a scene."""


@dataclass(frozen=True, kw_only=True)
class EncodedScenes:
    """Held-out scenes or clips as a language model reads them, with their questions.

    Attributes:
        features: projected visual tokens, float32 ``(S, N, D)``.
        questions: the distinct questions about each scene; S entries.
        types: the question types that are asked, in order.
        seed: seed of the scene generator.
        layout: where the N tokens lie: the 144 of a scene, or those of a clip.
        signals: of the vision encoder, ``(S, N, ...)`` each, for strategies that read them.
    """

    features: Tensor
    questions: tuple[tuple[Question, ...], ...]
    types: tuple[str, ...]
    seed: int
    layout: Layout = GRID
    signals: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def scene_of(self) -> NDArray[np.int64]:
        """``(Q,)`` scene of each question."""
        return np.repeat(np.arange(len(self.questions)), [len(row) for row in self.questions])

    def only(self, types: Sequence[str]) -> tuple["EncodedScenes", Correct]:
        """The same scenes with the questions of some types, and which questions those are."""
        asked = [question.type in types for row in self.questions for question in row]
        questions = tuple(
            tuple(question for question in row if question.type in types) for row in self.questions
        )
        return replace(self, questions=questions, types=tuple(types)), np.array(asked, bool)


@torch.no_grad()
def encode_scenes(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    *,
    seed: int,
    scenes: int,
    types: Sequence[str],
) -> EncodedScenes:
    """Render held-out scenes, ask about them and encode them.

    Args:
        model: a testbed model.
        processor: its processor.
        seed: selects the scenes. Parameters are tuned on other seeds than results are reported on.
        scenes: how many, at least 1.
        types: question types to ask.

    Raises:
        ValueError: if there are no scenes or no types, or a type is unknown.
    """
    if scenes < 1 or not types:
        raise ValueError(f"nothing to evaluate: {scenes} scenes, question types {list(types)}")
    generator = SceneGenerator(seed, "test")
    features, questions = [], []
    for start in range(0, scenes, BATCH_SIZE):
        drawn = [generator.scene(i) for i in range(start, min(start + BATCH_SIZE, scenes))]
        images = [scene.image for scene in drawn]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        features.append(torch.stack(list(model.get_image_features(pixels).pooler_output)).float())
        questions += [
            tuple(generator.questions(scene, count=QUESTIONS, types=types)) for scene in drawn
        ]
    return EncodedScenes(
        features=torch.cat(features), questions=tuple(questions), types=tuple(types), seed=seed
    )


@torch.no_grad()
def encode_clips(
    model: LlavaOnevisionForConditionalGeneration,
    processor: LlavaOnevisionProcessor,
    *,
    seed: int,
    clips: int,
    types: Sequence[str],
    signals: Sequence[str] = (),
    conditions: Conditions | None = None,
) -> EncodedScenes:
    """Render held-out clips, ask about them and encode them.

    Args:
        model: the testbed model that sees clips.
        processor: its processor.
        seed: selects the clips. Parameters are tuned on other seeds than results are reported on.
        clips: how many, at least 1.
        types: question types to ask.
        signals: what to read of the vision encoder beside the features, such as
            ``"class_attention"``.
        conditions: how the clips are filmed.

    Raises:
        ValueError: if there are no clips or no types, or a type is unknown.
    """
    if clips < 1 or not types:
        raise ValueError(f"nothing to evaluate: {clips} clips, question types {list(types)}")
    generator = ClipGenerator(seed, "test", conditions)
    probe = PROBES(model.model, signals, None)
    features, questions = [], []
    caught: dict[str, list[Tensor]] = {name: [] for name in signals}
    try:
        for start in range(0, clips, BATCH_SIZE):
            drawn = [generator.clip(i) for i in range(start, min(start + BATCH_SIZE, clips))]
            frames = [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in drawn]
            inputs = processor.video_processor(frames, return_tensors="pt")
            probe.begin()
            found = model.get_video_features(**inputs).pooler_output
            for item in probe.read("video", found, inputs):
                for name, signal in item.items():
                    caught[name].append(signal.float())
            features.append(found.float())
            questions += [
                tuple(generator.questions(clip, count=QUESTIONS, types=types)) for clip in drawn
            ]
    finally:
        probe.detach()
    (layout,) = pooled_frames(model.model, features[0][:1], inputs)
    return EncodedScenes(
        features=torch.cat(features),
        questions=tuple(questions),
        types=tuple(types),
        seed=seed,
        layout=layout,
        signals={name: torch.stack(parts) for name, parts in caught.items()},
    )


@torch.no_grad()
def answer_questions(
    model: LlavaForConditionalGeneration | LlavaOnevisionForConditionalGeneration,
    encoded: EncodedScenes,
    reducer: Reducer | None = None,
) -> Correct:
    """Answer every question from the reduced tokens of its scene.

    Args:
        model: the model that encoded the scenes.
        encoded: scenes with their questions.
        reducer: reads features alone, and has a budget; None leaves the tokens as they are.

    Returns:
        which answers are right.

    Raises:
        BudgetError: if the reducer has no budget and does not decide by itself.
        MissingSignal: if the reducer reads more than features and the encoded signals.
    """
    right: list[bool] = []
    # Dense batches need equal counts, which a strategy that decides from the data does not give.
    size = 1 if reducer is not None and reducer.record.count == "adaptive" else BATCH_SIZE
    for start in range(0, len(encoded.questions), size):
        rows = encoded.questions[start : start + size]
        features = encoded.features[start : start + size]
        unreduced = features.shape[1]
        positions = packed.image_positions(len(features), unreduced)
        if reducer is not None:
            signals = {k: signal[start : start + size] for k, signal in encoded.signals.items()}
            reduction = reduce_features(reducer, features, encoded.layout, signals)
            features, positions = reduction.features, positions.gather(1, reduction.positions)
        texts = [[question.text for question in row] for row in rows]
        answers = packed.answer(model, features, positions, texts, unreduced=unreduced)
        for row, words in zip(rows, answers, strict=True):
            right += [word == question.answer for question, word in zip(row, words, strict=True)]
    return np.array(right, bool)


def reduce_features(
    reducer: Reducer,
    features: Tensor,
    layout: Layout = GRID,
    signals: Mapping[str, Tensor] | None = None,
) -> Reduction:
    """Reduce projected features ``(B, N, D)`` of scenes or clips of one layout."""
    return reducer(VisualTokens(features, layout, signals=dict(signals or {})))


class Bootstrap(statistics.Bootstrap):
    """The statistics of answers to the questions about encoded scenes.

    Args:
        encoded: the scenes and questions that the answers belong to.
        resamples: how many, at least 1.
        seed: of the resamples.
    """

    def __init__(
        self, encoded: EncodedScenes, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        types = [question.type for row in encoded.questions for question in row]
        super().__init__(encoded.scene_of.tolist(), types, resamples=resamples, seed=seed)
