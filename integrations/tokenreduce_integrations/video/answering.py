"""A question about a video file: frames are encoded and reduced as they are decoded.

Served are models that encode the frames of a clip independently of each other and place them by
(t, y, x) rotary positions: Qwen2-VL and Qwen2.5-VL. The result is that of the whole clip through
the attachment as long as it fits the budget and a window of the stream.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tokenreduce.errors import MediaError, PipelineError, UnsupportedModel
from tokenreduce.receipt import ItemReceipt, Receipt, StageReceipt, Stopwatch
from tokenreduce.reducer import Reducer
from tokenreduce.stage import Stage
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_by_layer
from tokenreduce_integrations.video.decoding import VideoFile

#: Moments (pairs of frames, for Qwen) that are encoded at once.
MOMENTS = 4
#: Frames a second where the video processor states none.
DEFAULT_FPS = 2.0
SERVED = ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Encoded:
    """A clip that was encoded and reduced.

    Attributes:
        tokens: the tokens that are left, a batch of one, with coordinates (block, t, y, x).
        grid: (T, H, W) in tokens of the whole clip.
        first: the first moment's frames, which stand for the clip in the prompt.
        fps: frames a second.
        stopwatch: the time that reducing took.
    """

    tokens: VisualTokens
    grid: tuple[int, int, int]
    first: tuple[Image.Image, ...]
    fps: float
    stopwatch: Stopwatch


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


def require_served(model: Any, processor: Any) -> None:
    """Check that a model's clips can be encoded a few frames at a time.

    Raises:
        UnsupportedModel: if they cannot.
    """
    kind = getattr(model.config, "model_type", "")
    if kind not in SERVED or getattr(processor, "video_processor", None) is None:
        raise UnsupportedModel(
            f"{type(model).__name__} ({kind}): video files are read by models of the types "
            f"{', '.join(SERVED)}. Give a folder of frames: mkdir frames && ffmpeg -i clip.mp4 -vf "
            "fps=1 frames/%04d.png"
        )


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
        MediaError: if the file cannot be decoded.
        BudgetError: if the reducer has no budget.
        TokensError: if the strategy cannot work on a stream.
        MissingSignal: likewise.
    """
    video = processor.video_processor
    fps = float(fps or video.fps or DEFAULT_FPS)
    stopwatch, stream = Stopwatch(), None
    kept: list[Tensor] = []
    first: tuple[Image.Image, ...] = ()
    moments, height, width = 0, 0, 0
    frames = file.frames(fps)
    for batch in _batches(frames, MOMENTS * video.temporal_patch_size):
        pixels = video(videos=[np.stack(batch)], do_sample_frames=False, return_tensors="pt")
        grid = pixels["video_grid_thw"]
        output = model.model.get_video_features(
            pixels["pixel_values_videos"].to(model.device), grid.to(model.device), return_dict=True
        )
        [features] = output.pooler_output
        t, h, w = grid[0].tolist()
        h, w = h // video.merge_size, w // video.merge_size
        if not first:
            first = tuple(Image.fromarray(f) for f in batch[: video.temporal_patch_size])
            height, width = h, w
            if reducer is not None:
                estimate = max(t, round((file.duration or 0) * fps / video.temporal_patch_size))
                stream = reducer.stream(budget=reducer.count(estimate * h * w))
        with stopwatch.running(features.device):
            if stream is None:
                kept.append(features)
            else:
                stream.feed(features, (t, h, w))
        moments += t
        progress(moments * video.temporal_patch_size / fps)
    whole = (moments, height, width)
    if stream is None or reducer is None:
        tokens = VisualTokens.from_grid(torch.cat(kept), whole)
    else:
        with stopwatch.running(model.device):
            tokens = stream.tokens()
            if reducer.count(stream.seen) < tokens.count:
                # The stated duration was longer than the clip.
                reduced = reducer.with_budget(keep=reducer.count(stream.seen))(tokens)
                [tokens] = reduced.tokens(tokens)
    return Encoded(tokens, whole, first, fps, stopwatch)


@torch.no_grad()
def answer(
    model: Any, processor: Any, clip: Encoded, question: str, *, max_new_tokens: int
) -> tuple[str, tuple[int, int]]:
    """The model's most likely answer, and the lengths of the whole and the shorter sequence."""
    media = chat.Media("video", clip.first)
    inputs = chat.encode(processor, media, question, model.device)
    ids = inputs["input_ids"][0]
    places = (ids == processor.video_token_id).nonzero()[:, 0]
    before, after = ids[: places[0]], ids[places[-1] + 1 :]
    embed = model.get_input_embeddings()
    features = clip.tokens.features[0].to(embed.weight.dtype)
    embeds = torch.cat([embed(before), features, embed(after)])[None]
    positions = _positions(model, processor, clip, before, after)
    output: Tensor = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
        position_ids=positions,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    text: str = processor.batch_decode(output, skip_special_tokens=True)[0]
    text_length = len(before) + len(after)
    return text.strip(), (text_length + prod(clip.grid), embeds.shape[1])


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
    whole = prod(clip.grid)
    reason = "" if clip.tokens.count < whole else f"{whole} tokens, within the budget"
    if not reduced:
        reason = "the attachment is disabled"
    done = StageReceipt(
        strategy=stage.reducer.name,
        site=stage.site,
        tokens_in=whole,
        tokens_out=clip.tokens.count,
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


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, ...]]:
    while batch := tuple(islice(frames, size)):
        if len({frame.shape for frame in batch}) > 1:
            raise MediaError("the pictures of this clip change their size. Scale them to one size.")
        yield batch


def _positions(model: Any, processor: Any, clip: Encoded, before: Tensor, after: Tensor) -> Tensor:
    """Rotary positions ``(3, 1, S)`` of the shorter sequence, as those of the whole one.

    The model itself is asked for the positions of a clip of two moments: each further one moves on
    by the same step, and the text behind the clip does not depend on their number.

    Raises:
        UnsupportedModel: if that text does depend on it.
    """
    _, h, w = clip.grid
    one, two = (_model_positions(model, processor, clip, before, after, t) for t in (1, 2))
    end = len(before) + h * w
    if not one[:, end:].equal(two[:, end + h * w :]):
        raise UnsupportedModel(
            f"{type(model).__name__}: positions of the text after a clip depend on its length. "
            "Give a folder of frames."
        )
    place, step = one[:, len(before) : end], two[:, end] - one[:, len(before)]
    _, t, y, x = clip.tokens.layout.coords.to(one.device).unbind(1)
    visual = place[:, y * w + x] + t * step[:, None]
    return torch.cat([one[:, : len(before)], visual, one[:, end:]], dim=1)[:, None]


def _model_positions(
    model: Any, processor: Any, clip: Encoded, before: Tensor, after: Tensor, moments: int
) -> Tensor:
    video = processor.video_processor
    _, h, w = clip.grid
    visual = before.new_full((moments * h * w,), processor.video_token_id)
    ids = torch.cat([before, visual, after])[None]
    merge = video.merge_size
    arguments = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == processor.video_token_id).int(),
        "video_grid_thw": torch.tensor([[moments, h * merge, w * merge]], device=ids.device),
        "second_per_grid_ts": torch.tensor([video.temporal_patch_size / clip.fps]),
        "attention_mask": torch.ones_like(ids),
    }
    known = inspect.signature(model.model.get_rope_index).parameters
    positions: Tensor = model.model.get_rope_index(
        **{name: value for name, value in arguments.items() if name in known}
    )[0]
    return positions[:, 0]
