"""A question about a video file: frames are encoded and reduced as they are decoded.

The result is that of the whole clip through the attachment as long as it fits the budget and a
window of the stream. Models that take frames for images (InternVL) have each reduced by itself
there; here the clip is one item.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenreduce.errors import MediaError, PipelineError
from tokenreduce.receipt import ItemReceipt, Receipt, StageReceipt, Stopwatch
from tokenreduce.reducer import Reducer
from tokenreduce.stage import Stage
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_by_layer
from tokenreduce_integrations.video.decoding import VideoFile
from tokenreduce_integrations.video.forms import Chunk, ClipForm, form_of
from tokenreduce_integrations.video.prompts import places_in, write_prompt

#: Moments (pairs of frames, for Qwen) that are encoded at once.
MOMENTS = 4
#: Frames a second where the video processor states none.
DEFAULT_FPS = 2.0


@dataclass(frozen=True)
class Encoded:
    """A clip that was encoded and reduced.

    Attributes:
        tokens: the tokens that are left, a batch of one, with coordinates (block, t, y, x); beside
            each, what DeepStack adds to it.
        grid: (T, H, W) in tokens of the whole clip.
        form: how the model takes clips.
        chunk: the first frames, without their features.
        frames: pictures that were read.
        fps: of them a second.
        stopwatch: the time that reducing took.
    """

    tokens: VisualTokens
    grid: tuple[int, int, int]
    form: ClipForm
    chunk: Chunk
    frames: int
    fps: float
    stopwatch: Stopwatch

    @property
    def whole(self) -> int:
        """Tokens of the whole clip."""
        return prod(self.grid) + len(self.chunk.end)

    @property
    def left(self) -> int:
        """Tokens that are left of it."""
        return self.tokens.count + len(self.chunk.end)


def the_stage(stages: tuple[Stage, ...]) -> Stage:
    """The one stage that a clip is reduced by.

    Raises:
        PipelineError: if there are others, or it is elsewhere than at the projector.
    """
    if len(stages) != 1 or stages[0].site != "projector" or stages[0].total is not None:
        raise PipelineError(
            "a video file is reduced while it is read, by one stage at the site 'projector' with a "
            "budget of its own. Change the pipeline, or give a folder of frames."
        )
    return stages[0]


@torch.no_grad()
def encode_clip(
    model: Any,
    processor: Any,
    file: VideoFile,
    reducer: Reducer | None,
    *,
    fps: float | None = None,
    progress: Callable[[float], None] = lambda seconds: None,
) -> Encoded:
    """Decode, encode and reduce a clip.

    Args:
        model: a served model.
        processor: its processor.
        file: the clip.
        reducer: with a budget; None keeps every token, in memory that grows with the clip.
        fps: frames a second; the video processor's own rate if omitted.
        progress: called with the seconds read so far.

    Raises:
        UnsupportedModel: if the model's clips cannot be encoded a few frames at a time.
        MediaError: if the file cannot be decoded.
        BudgetError: if the reducer has no budget.
        TokensError: if the strategy cannot work on a stream.
        MissingSignal: likewise.
    """
    form, video = form_of(model, processor), processor.video_processor
    fps = float(fps or video.fps or DEFAULT_FPS)
    expected = file.count(fps)
    moment = form.moment(video)
    stopwatch, stream = Stopwatch(), None
    kept: list[Tensor] = []
    first: Chunk | None = None
    frames = moments = 0
    for pictures in _batches(file.frames(fps), MOMENTS * moment):
        if first is None:
            size = form.size(video, expected, pictures.shape[1:])
        chunk = form.encode(model, form.process(video, pictures, size))
        t, h, w = chunk.grid
        if first is None:
            first = replace(chunk, features=chunk.features[:0].clone())
            if reducer is not None:
                budget = reducer.count(max(t, -(-expected // moment)) * h * w)
                stream = reducer.stream(budget=budget, channels=chunk.channels)
        with stopwatch.running(chunk.features.device):
            if stream is None:
                kept.append(chunk.features)
            else:
                stream.feed(chunk.features, chunk.grid)
        frames, moments = frames + len(pictures), moments + t
        progress(frames / fps)
    if first is None:
        raise MediaError(f"{file.path}: holds no picture that can be decoded.")
    grid = (moments, h, w)
    if stream is None or reducer is None:
        tokens = VisualTokens.from_grid(torch.cat(kept), grid)
    else:
        with stopwatch.running(model.device):
            tokens = stream.tokens()
            if reducer.count(stream.seen) < tokens.count:
                # More was expected than could be decoded.
                held = VisualTokens(
                    tokens.features[..., : first.channels],
                    tokens.layout,
                    sizes=tokens.sizes,
                    values=tokens.features,
                )
                exact = reducer.with_budget(keep=reducer.count(stream.seen))
                [tokens] = exact(held).tokens(held)
    return Encoded(tokens, grid, form, first, frames, fps, stopwatch)


@torch.no_grad()
def answer(
    model: Any, processor: Any, clip: Encoded, question: str, *, max_new_tokens: int
) -> tuple[str, tuple[int, int]]:
    """The model's most likely answer, and the lengths of the whole and the shorter sequence."""
    prompt = write_prompt(
        processor,
        clip.form,
        question,
        grid=clip.grid,
        end=len(clip.chunk.end),
        frame=clip.chunk.frame,
        frames=clip.frames,
        fps=clip.fps,
    )
    coords = clip.tokens.layout.coords
    ids = prompt.ids(coords)[None].to(model.device)
    positions = prompt.positions(coords, places_in(model, processor, clip.form, prompt, clip.fps))
    if len(positions) > 1:
        positions = positions[:, None]
    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=positions.to(model.device),
        mm_encoder_outputs={
            clip.form.modality: clip.form.restore(clip.chunk, clip.tokens.features[0])
        },
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    text: str = processor.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)[0]
    return text.strip(), (prompt.length, ids.shape[1])


def receipt(
    model: nn.Module,
    clip: Encoded,
    stage: Stage,
    lengths: tuple[int, int],
    *,
    reduced: bool = True,
) -> Receipt:
    """What happened, as an attachment would tell it.

    Args:
        model: the model.
        clip: the clip.
        stage: the stage of the pipeline.
        lengths: of the whole and the shorter sequence.
        reduced: whether the stage was asked to act.
    """
    decoder = families.find_decoder(model)
    reason = stage.reducer.reason_to_keep_all(prod(clip.grid))
    if not reduced:
        reason = "the attachment is disabled"
    done = StageReceipt(
        strategy=stage.reducer.name,
        site=stage.site,
        tokens_in=clip.whole,
        tokens_out=clip.left,
        protected=len(clip.chunk.end),
        reason=reason,
    )
    return Receipt(
        items=(ItemReceipt(prompt=0, modality="video", stages=(done,)),),
        sequence_in=lengths[0],
        sequence_out=lengths[1],
        layers=decoder.config.num_hidden_layers,
        kv_bytes_by_layer=kv_bytes_by_layer(decoder),
        stopwatch=clip.stopwatch,
        reason=reason,
    )


def _batches(frames: Iterator[np.ndarray], count: int) -> Iterator[Tensor]:
    """Pictures ``(n, height, width, 3)``, so many at once."""
    shape: tuple[int, ...] = ()
    while batch := tuple(islice(frames, count)):
        shape = shape or batch[0].shape
        if any(frame.shape != shape for frame in batch):
            raise MediaError("the pictures of this clip change their size. Scale them to one size.")
        yield torch.from_numpy(np.stack(batch))
