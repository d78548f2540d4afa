"""A question about a picture or clip, from files to the answer of a model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor, nn

from tokenreduce.errors import MediaError, PipelineError

if TYPE_CHECKING:
    from tokenreduce_integrations.video.decoding import VideoFile

_CLIP_HINT = (
    "A clip is given as a folder of frames: "
    "mkdir frames && ffmpeg -i clip.mp4 -vf fps=1 frames/%04d.png"
)
_CLIP_FILES = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class Media:
    """A picture, or the frames of a clip, in RGB."""

    modality: Literal["image", "video"]
    frames: tuple[Image.Image, ...]


def open_media(path: Path) -> Media:
    """Open a picture, an animation, or a folder of frames (in the order of their names).

    Raises:
        MediaError: if it is none of these.
    """
    if _is_dir(path):
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
        if not files:
            raise MediaError(f"{path}: the folder holds no frames. {_CLIP_HINT}")
        return Media("video", tuple(_open_frames(file)[0] for file in files))
    frames = _open_frames(path)
    return Media("image" if len(frames) == 1 else "video", frames)


def open_video_file(path: Path) -> VideoFile | None:
    """A video file by its name, or None for anything else.

    Raises:
        MediaError: if it cannot be read.
        MissingExtra: if the package that reads it is not installed.
    """
    if path.suffix.lower() not in _CLIP_FILES or _is_dir(path):
        return None
    from tokenreduce_integrations.video.decoding import VideoFile

    return VideoFile(path)


def require_question(question: str) -> str:
    """The question without surrounding spaces.

    Raises:
        MediaError: if nothing is left.
    """
    if not question.strip():
        raise MediaError('the question is empty. Ask something, as in "what is in the picture?"')
    return question.strip()


def quiet_loading() -> None:
    """Keep progress bars out of files and pipes."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def write(processor: Any, modality: str, question: str) -> str:
    """A question in the words of the processor's chat template; media are to come.

    Raises:
        PipelineError: if the processor has no chat template.
    """
    text: str = processor.apply_chat_template(
        _conversation(processor, modality, "", question), add_generation_prompt=True, tokenize=False
    )
    return text


def encode(
    processor: Any, media: Media, question: str, device: torch.device, *, fps: float | None = None
) -> dict[str, Any]:
    """The model's inputs for one question, through the processor's chat template.

    Args:
        processor: the model's.
        media: a picture, or a clip, whose frames are all taken.
        question: about it.
        device: the model's.
        fps: frames a second of the clip, for processors that write times into the prompt.

    Raises:
        PipelineError: if the processor has no chat template.
        MediaError: if the processor cannot take this kind of media.
    """
    shown = media.frames[0] if media.modality == "image" else list(media.frames)
    conversation = _conversation(processor, media.modality, shown, question)
    settings: dict[str, Any] = {}
    if media.modality == "video":
        if getattr(processor, "video_processor", None) is None:
            raise MediaError(
                f"this model takes no clips ({type(processor).__name__}): give a picture."
            )
        settings["do_sample_frames"] = False
        if fps is not None:
            count = len(media.frames)
            times = {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}
            settings["video_metadata"] = [times]
    width, height = media.frames[0].size
    what = f"this {media.modality} of {width} x {height} pixels and {len(media.frames)} frames"
    return dict(templated(processor, conversation, what, **settings).to(device))


def templated(processor: Any, conversations: Any, what: str, **settings: Any) -> Any:
    """What a processor's chat template makes of one conversation or several.

    Args:
        processor: the model's, with a chat template.
        conversations: with their pictures or clips.
        what: they are, for the error.
        **settings: of the processor.

    Raises:
        MediaError: if the processor cannot take them.
    """
    try:
        return processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=settings,
        )
    except (ValueError, IndexError) as error:
        raise MediaError(f"{type(processor).__name__} cannot take {what}: {error}") from error


def _conversation(processor: Any, modality: str, shown: Any, question: str) -> list[dict[str, Any]]:
    if getattr(processor, "chat_template", None) is None:
        raise PipelineError(
            f"{type(processor).__name__} has no chat template, so a question cannot be put to this "
            "model. Use a model whose processor has one."
        )
    content = [{"type": modality, modality: shown}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def answer(model: nn.Module, processor: Any, inputs: dict[str, Any], *, max_new_tokens: int) -> str:
    """The model's most likely answer."""
    generate: Any = model.generate
    output: Tensor = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return text.strip()


def _is_dir(path: Path) -> bool:
    """Whether a path is a folder.

    Raises:
        MediaError: if there is nothing, or the path is impossible.
    """
    try:
        if path.exists():
            return path.is_dir()
    except (OSError, ValueError) as error:
        raise MediaError(f"{str(path)[:80]!r}: is not a path: {error}.") from error
    raise MediaError(f"{path}: no such file or folder.")


def _open_frames(path: Path) -> tuple[Image.Image, ...]:
    try:
        with Image.open(path) as opened:
            return tuple(
                ImageOps.exif_transpose(frame).convert("RGB")
                for frame in ImageSequence.Iterator(opened)
            )
    except UnidentifiedImageError as error:
        is_clip = path.suffix.lower() in _CLIP_FILES
        hint = _CLIP_HINT if is_clip else "Give a PNG, JPEG or WebP file."
        raise MediaError(f"{path}: is not an image. {hint}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: the image cannot be read: {error}.") from error
