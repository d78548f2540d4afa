"""Training clips: encoded once by a frozen vision tower, asked about anew in every pass.

    python benchmarks/testbed/clip_data.py --out POOL --chunks 24

A pool is a folder of chunks, each with the visual tokens of a thousand clips. Training can start
on the first chunk while later ones are still being encoded.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from architecture import build_video_model, register_training_attention, start_from_pictures
from data import IGNORED
from losses import normalise
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration

from tokenreduce_integrations.testbed.clips import FRAMES, Clip, ClipGenerator, ClipObject, ask
from tokenreduce_integrations.testbed.models import load
from tokenreduce_integrations.testbed.scenes import IMAGE_SIZE, Question
from tokenreduce_integrations.testbed.vocabulary import (
    COLORS,
    DIRECTIONS,
    EOS,
    PAD,
    SHAPES,
    TOKEN_IDS,
    encode_turn,
)

SEED = 3
CHUNK = 1000
ENCODED = 25
CELLS = 6
"""Pooled tokens along a side of a frame."""
CELL = IMAGE_SIZE // CELLS
FRAME_TOKENS = CELLS**2
CLIP_TOKENS = FRAMES * FRAME_TOKENS
"""Visual tokens of a clip, without the newline that ends it."""
QUESTIONS = 6
QUESTION_WIDTH = 10
"""Tokens of the longest question with its answer."""

KINDS = 1 + len(SHAPES) * len(COLORS)
"""What a token shows: nothing, or a shape in a colour."""
MOTIONS = 2 + len(DIRECTIONS)
"""What a token's object does: there is none, it rests, or it moves in a direction."""


@dataclass
class Chunk:
    """Encoded clips.

    Attributes:
        features: bfloat16 ``(C, 288, D)``, projected and pooled.
        clips: the clips, without their frames.
        kinds: what each token shows, int64 ``(C, 288)``.
        motions: what its object does at that time, `IGNORED` before it has begun and after it has
            arrived, int64 ``(C, 288)``.
        centres: tokens that tell all: the centre of each moving object in every frame, and of each
            still one in one frame, bool ``(C, 288)``.
    """

    features: Tensor
    clips: list[Clip]
    kinds: Tensor
    motions: Tensor
    centres: Tensor


@dataclass
class ClipBatch:
    """Tensors of a batch of B clips with Q questions each.

    Attributes:
        features: float32 ``(B, 288, D)``.
        questions: up to Q for each clip.
        kinds, motions, centres: see `Chunk`.
        input_ids: Questions with their answers, int64 ``(B, Q, L)``.
        targets: The next token where it is part of an answer, else `IGNORED`, same shape.
        word_motions: What the object does that a shape word of a question names, `IGNORED` for
            other words and unless there is exactly one such object, int64 ``(B, Q, L)``.
        word_centres: Where it is in the first and in the last frame, in -1..1, NaN alike, float32
            ``(B, Q, L, 4)``.
    """

    features: Tensor
    questions: list[list[Question]]
    kinds: Tensor
    motions: Tensor
    centres: Tensor
    input_ids: Tensor
    targets: Tensor
    word_motions: Tensor
    word_centres: Tensor


def make_batch(chunk: Chunk, rows: np.ndarray, visit: int, types: Mapping[str, float]) -> ClipBatch:
    """Ask about some clips of a chunk, differently at every visit."""
    clips = [chunk.clips[row] for row in rows]
    asked = [
        ask(np.random.default_rng((*clip.key, 3, visit)), clip, QUESTIONS, types) for clip in clips
    ]
    encoded = [
        encode_answers(questions, clip) for questions, clip in zip(asked, clips, strict=True)
    ]
    input_ids, targets, motions, centres = (
        torch.from_numpy(np.stack(part)) for part in zip(*encoded, strict=True)
    )
    chosen = torch.from_numpy(rows)
    return ClipBatch(
        features=chunk.features[chosen].float(),
        questions=asked,
        kinds=chunk.kinds[chosen],
        motions=chunk.motions[chosen],
        centres=chunk.centres[chosen],
        input_ids=input_ids,
        targets=targets,
        word_motions=motions,
        word_centres=centres,
    )


def encode_answers(
    questions: list[Question], clip: Clip
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, targets, and what the shape words name; see `ClipBatch`."""
    input_ids = np.full((QUESTIONS, QUESTION_WIDTH), TOKEN_IDS[PAD])
    targets = np.full((QUESTIONS, QUESTION_WIDTH), IGNORED)
    motions = np.full((QUESTIONS, QUESTION_WIDTH), IGNORED)
    centres = np.full((QUESTIONS, QUESTION_WIDTH, 4), np.nan, np.float32)
    names = [item.shape for item in clip.objects]
    named = {TOKEN_IDS[item.shape]: item for item in clip.objects if names.count(item.shape) == 1}
    for row, question in enumerate(questions):
        turn = encode_turn(question.text)
        answer = TOKEN_IDS[question.answer]
        input_ids[row, : len(turn) + 1] = [*turn, answer]
        targets[row, len(turn) - 1 : len(turn) + 1] = (answer, TOKEN_IDS[EOS])
        for column, token in enumerate(turn):
            if token in named:
                item = named[token]
                motions[row, column] = _motion_label(item)
                ends = np.array([item.centres[0], item.centres[-1]]).ravel()
                centres[row, column] = 2 * ends / IMAGE_SIZE - 1
    return input_ids, targets, motions, centres


def token_labels(clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kinds, motions and centres of the tokens of a clip, each ``(288,)``; see `Chunk`."""
    kinds = np.zeros((FRAMES, CELLS, CELLS), np.int64)
    motions = np.zeros((FRAMES, CELLS, CELLS), np.int64)
    marked = np.zeros((FRAMES, CELLS, CELLS), bool)
    middle = (np.arange(CELLS) + 0.5) * CELL
    for index, item in enumerate(clip.objects):
        kind = 1 + SHAPES.index(item.shape) * len(COLORS) + COLORS.index(item.color)
        for frame, (x, y) in enumerate(item.centres):
            column, row = x // CELL, y // CELL
            reach = CELL / 2 + 0.4 * item.radius
            covered = np.ix_(abs(middle - y) <= reach, abs(middle - x) <= reach)
            kinds[frame][covered] = kind
            motions[frame][covered] = _motion_label(item, frame)
            marked[frame, row, column] |= item.motion is not None or (
                frame == (index + clip.key[2]) % FRAMES
            )
    return kinds.ravel(), motions.ravel(), marked.ravel()


def _motion_label(item: ClipObject, frame: int | None = None) -> int:
    """What an object does, in the whole clip or in one frame."""
    if item.motion is None:
        return 1
    if frame is not None and not item.motion.start < frame <= item.motion.end:
        return IGNORED
    return 2 + DIRECTIONS.index(item.motion.direction)


@torch.no_grad()
def encode_chunk(
    model: LlavaOnevisionForConditionalGeneration, generator: ClipGenerator, index: int
) -> Chunk:
    """Render and encode the clips of a chunk."""
    features, clips = [], []
    for start in range(index * CHUNK, (index + 1) * CHUNK, ENCODED):
        drawn = [generator.clip(i) for i in range(start, start + ENCODED)]
        pixels = normalise(torch.from_numpy(np.concatenate([clip.frames for clip in drawn])))
        with torch.autocast("cpu", torch.bfloat16):
            found = model.get_video_features(pixels.unflatten(0, (-1, FRAMES))).pooler_output
        features.append(found[:, :CLIP_TOKENS].to(torch.bfloat16))
        clips += [Clip(clip.frames[:0], clip.objects, clip.background, clip.key) for clip in drawn]
    labels = zip(*map(token_labels, clips), strict=True)
    kinds, motions, centres = (torch.from_numpy(np.stack(part)) for part in labels)
    return Chunk(torch.cat(features), clips, kinds, motions, centres)


def load_chunk(pool: Path, index: int) -> Chunk:
    """Load a chunk, waiting until it has been encoded."""
    path = pool / f"{index}.pt"
    while not path.exists():
        time.sleep(1)
    chunk: Chunk = torch.load(path, weights_only=False)
    return chunk


def new_model() -> LlavaOnevisionForConditionalGeneration:
    """Build the model for clips as it is before training."""
    torch.manual_seed(SEED)
    model = build_video_model()
    start_from_pictures(model, load("b")[0])
    return model


def main() -> None:
    """Parse the command line and encode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chunks", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    model = new_model().eval()
    model.set_attn_implementation(register_training_attention())
    generator = ClipGenerator(SEED, "train")
    for index in range(options.chunks):
        path = options.out / f"{index}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(encode_chunk(model, generator, index), partial)
            partial.replace(path)


if __name__ == "__main__":
    # Chunks are pickled: their classes must belong to this module, not to `__main__`.
    from clip_data import main as run

    run()
