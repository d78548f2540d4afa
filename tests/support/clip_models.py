"""Tiny models that take clips, each with a processor of its own class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from support import tiny_families, tiny_models
from support.tiny_models import IMAGE, VIDEO, VOCABULARY

SIDE = 56
SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PLAIN = (
    "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
    "{% if c['type'] == 'video' %}<|video_pad|>{% elif c['type'] == 'image' %}<|image_pad|>"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
BOUNDS = ("<|begin_of_video|>", "<|end_of_video|>")
WRAPPED = PLAIN.replace("<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>")


class ClipModel(NamedTuple):
    """A model, and its processor."""

    model: Any
    processor: Any


def tokenizer() -> Any:
    """Words have the ids that tiny models give to media."""
    times = ["<", ">", ".", ":", "seconds", *"0123456789", *(f"Frame{i}" for i in range(1, 40))]
    first = ["<pad>", "<bos>", "<unk>", "user", "what", "moves", "here", *SPECIAL, *BOUNDS, *times]
    words = [*first, *(f"w{i}" for i in range(len(first), VOCABULARY))]
    assert words.index(SPECIAL[0]) == IMAGE
    assert words.index(SPECIAL[1]) == VIDEO
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    words_alone = Tokenizer(vocabulary)
    words_alone.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_alone,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": SPECIAL[0],
            "context_image_token": SPECIAL[0],
            "video_token": SPECIAL[1],
            "start_image_token": SPECIAL[2],
            "end_image_token": SPECIAL[3],
            "begin_of_video_token": BOUNDS[0],
            "end_of_video_token": BOUNDS[1],
        },
    )


def _llava(name: str, image: str, model: Any, *, size: dict[str, int], **own: Any) -> ClipModel:
    """A model whose frames have one size."""
    crop = {"height": SIDE, "width": SIDE}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=getattr(transformers, image)(size=size),
        tokenizer=tokenizer(),
        video_processor=getattr(transformers, f"{name}VideoProcessor")(size=size, crop_size=crop),
        chat_template=PLAIN,
        **own,
    )
    return ClipModel(model, processor)


def _qwen(name: str, video: str, model: Any, template: str, pixels: int, **own: Any) -> ClipModel:
    """A model whose frames have their own size, of at most so many pixels."""
    size = {"shortest_edge": 56 * 56, "longest_edge": pixels}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=tokenizer(),
        video_processor=getattr(transformers, f"{video}VideoProcessor")(size=size, **own),
        chat_template=template,
    )
    return ClipModel(model, processor)


def _timed(model: Any, name: str = "Qwen3VL", **own: Any) -> ClipModel:
    """The pixels are those of a whole clip."""
    patch = model.config.vision_config.patch_size
    template = PLAIN.replace("<|video_pad|>", "<|video_pad|>".join(BOUNDS))
    return _qwen(name, name, model, template, 20 * 112 * 112, patch_size=patch, **own)


_SQUARE = {"height": SIDE, "width": SIDE}
_MODELS: dict[str, Callable[[], ClipModel]] = {
    "qwen2-vl": lambda: _qwen(
        "Qwen2VL",
        "Qwen2VL",
        tiny_models.qwen2_vl().model,
        WRAPPED,
        112 * 112,
        cap_pixels_per_frame=True,
        max_video_tokens=200,
    ),
    "qwen2.5-vl": lambda: _qwen(
        "Qwen2_5_VL",
        "Qwen2VL",
        tiny_models.qwen2_5_vl().model,
        WRAPPED,
        112 * 112,
        cap_pixels_per_frame=False,
    ),
    "qwen3-vl": lambda: _timed(tiny_models.qwen3_vl().model, cap_pixels_per_frame=False),
    "qwen3.5": lambda: _timed(tiny_families.model_of("qwen3.5"), cap_pixels_per_frame=True),
    "qwen3-vl-moe": lambda: _timed(
        tiny_families.model_of("qwen3-vl-moe"), cap_pixels_per_frame=False
    ),
    "qwen3.5-moe": lambda: _timed(
        tiny_families.model_of("qwen3.5-moe"), cap_pixels_per_frame=False
    ),
    "glm4v": lambda: _timed(tiny_families.model_of("glm4v-video"), "Glm4v"),
    "glm4v-moe": lambda: _timed(tiny_families.model_of("glm4v-moe"), "Glm4v"),
    "glm46v": lambda: _timed(tiny_families.model_of("glm46v"), "Glm46V"),
    "llava-onevision": lambda: _llava(
        "LlavaOnevision",
        "LlavaOnevisionImageProcessor",
        tiny_models.onevision().model,
        size=_SQUARE,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    ),
    "llava-next-video": lambda: _llava(
        "LlavaNextVideo",
        "LlavaNextImageProcessor",
        tiny_models.llava_next_video_model(),
        size={"shortest_edge": SIDE},
        patch_size=14,
        vision_feature_select_strategy="default",
    ),
    "internvl": lambda: _llava(
        "InternVL",
        "GotOcr2ImageProcessor",
        tiny_models.internvl().model,
        size=_SQUARE,
        image_seq_length=4,
    ),
}
#: These take clips as their siblings do.
SIBLINGS = ("qwen3-vl-moe", "qwen3.5-moe", "glm4v-moe", "glm46v")
NAMES = tuple(name for name in _MODELS if name not in SIBLINGS)
#: Their frames are written as images.
AS_IMAGES = ("internvl", "glm4v", "glm4v-moe", "glm46v")


@functools.cache
def clip_model(name: str) -> ClipModel:
    """A model by its name; shared."""
    return _MODELS[name]()
