"""A tiny Qwen2.5-VL with its processor, saved as files, and generated clips to ask about."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from support import tiny_models

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def processor(pixels: int = 1 << 20) -> Any:
    """A processor whose words have the ids of the tiny model."""
    first = ["<pad>", "<bos>", "<unk>", "user", "what", "moves", "here", *SPECIAL]
    words = [*first, *(f"w{i}" for i in range(len(first), tiny_models.VOCABULARY))]
    assert words[tiny_models.VIDEO] == "<|video_pad|>"
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    size = {"shortest_edge": 56 * 56, "longest_edge": pixels}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            additional_special_tokens=list(SPECIAL),
        ),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False, size=size),
        chat_template=TEMPLATE,
    )


def save_model(folder: Path, *, pixels: int = 1 << 20) -> Path:
    """Files that ``load_pipeline`` can build from."""
    model = tiny_models.qwen2_5_vl().model
    model.save_pretrained(folder)
    processor(pixels).save_pretrained(folder)
    return folder


def shapes(count: int, height: int, width: int, *, cut: int = 20) -> Iterable[np.ndarray]:
    """RGB pictures of a square that moves over a background, which changes every ``cut``."""
    for number in range(count):
        scene = np.random.default_rng(number // cut)
        coarse = scene.integers(0, 200, (6, 8, 3), dtype=np.uint8)
        picture = coarse.repeat(-(-height // 6), 0).repeat(-(-width // 8), 1)[:height, :width]
        side, at = height // 5, (number % cut) * (width - height // 5) // cut
        picture[height // 3 : height // 3 + side, at : at + side] = scene.integers(200, 256, 3)
        yield picture


def write_clip(
    path: Path,
    pictures: Iterable[np.ndarray],
    *,
    rate: int = 5,
    times: list[int] | None = None,
) -> Path:
    """Encode pictures; ``times`` are theirs in units of 1 / rate, for a variable rate."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".mp4" else "libx264", rate=rate)
        stream.bit_rate = 4_000_000
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.height, stream.width = picture.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if times is None else times[number]
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_sound(path: Path) -> Path:
    """A second of silence."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        frame.sample_rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    return path
