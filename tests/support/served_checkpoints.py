"""Tiny checkpoints of the families that vLLM serves, with tokenizer and processor, as files.

The files are as those of the model hub: keys, configuration, processor. They build in a second and
without a network, from the same random weights each time. Their tokenizer has one token for each
byte of text, so that the length of a prompt is known by looking at it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.tiny_models import IMAGE, VIDEO, lively

PAD, BOS, EOS, VISION_START, VISION_END = 0, 1, 2, 9, 10
FIRST_BYTE = 16
VOCABULARY = FIRST_BYTE + 256

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
}
PINPOINTS = [[84, 168], [168, 84], [168, 168]]
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
# The media of a message first, as the templates of all these families have it.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] in ('image', 'image_url') %}IMAGE"
    "{% elif c['type'] in ('video', 'video_url') %}VIDEO"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a checkpoint of a family is made, and how a prompt for it is written.

    Attributes:
        config: gives the configuration; called without arguments.
        processor: gives the processor; called with a tokenizer and the chat template.
        image: what stands for an image in a prompt.
        video: what stands for a clip in a prompt; None where the family takes no clips.
        words: tokens with an id of their own, by id.
        names: further names of tokens, which the processor asks its tokenizer for.
        renamed: parts of keys as transformers has them, and as the hub has them.
    """

    config: Callable[[], Any]
    processor: Callable[[Any, str], Any]
    image: str
    video: str | None
    words: dict[int, str]
    names: dict[str, str] = field(default_factory=dict)
    renamed: tuple[str, str] = ("", "")

    @property
    def template(self) -> str:
        """The chat template."""
        return TEMPLATE.replace("IMAGE", self.image).replace("VIDEO", self.video or "")

    def prompt(self, question: str, *, images: int = 0, videos: int = 0) -> str:
        """The prompt that the chat template makes of a user's question about media."""
        media = self.image * images + (self.video or "") * videos
        return f"user: {media}{question}\nassistant:"


def tokenizer(family: Family) -> Any:
    """One token for each byte, and the special tokens of the family."""
    first = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>", **family.words}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in first.items()}
    vocabulary |= {letter: FIRST_BYTE + i for i, letter in enumerate(letters)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(first[i], special=True) for i in sorted(first)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=family.template,
        extra_special_tokens=family.names,
    )


def _llava_config() -> Any:
    return transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 168},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=144,
        tie_word_embeddings=False,
    )


def _llava_processor(tokens: Any, template: str) -> Any:
    pixels = transformers.CLIPImageProcessor(
        size={"shortest_edge": 168}, crop_size={"height": 168, "width": 168}
    )
    return transformers.LlavaProcessor(
        pixels,
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _llava_next_config() -> Any:
    return transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER, "image_size": 84},
        text_config={"model_type": "mistral", "sliding_window": None, **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def _llava_next_processor(tokens: Any, template: str) -> Any:
    pixels = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 84},
        crop_size={"height": 84, "width": 84},
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextProcessor(
        pixels,
        tokens,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _onevision_config() -> Any:
    return transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **TOWER,
            "image_size": 84,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def _onevision_processor(tokens: Any, template: str) -> Any:
    size = {"height": 84, "width": 84}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokens,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=36,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def _internvl_config() -> Any:
    return transformers.InternVLConfig(
        vision_config={**TOWER, "image_size": [112, 112], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )


def _internvl_processor(tokens: Any, template: str) -> Any:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    size = {"height": 112, "width": 112}
    return transformers.InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
        tokens,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=template,
    )


#: How Qwen's encoders cut and merge patches.
PACKED = {"num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
#: The widths of those after the first.
LATER = {**PACKED, "depth": 3, "hidden_size": 64, "out_hidden_size": 128, "intermediate_size": 96}


def _qwen2_vl_config() -> Any:
    return transformers.Qwen2VLConfig(
        vision_config={
            **PACKED,
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
        text_config={**TEXT, "rope_parameters": ROPE},
        **QWEN_TOKENS,
    )


def _qwen2_5_vl_config() -> Any:
    return transformers.Qwen2_5_VLConfig(
        vision_config={
            **LATER,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        text_config={**TEXT, "rope_parameters": ROPE},
        **QWEN_TOKENS,
    )


def _qwen3_vl_config() -> Any:
    return transformers.Qwen3VLConfig(
        vision_config={
            **LATER,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={**TEXT, "rope_parameters": {"mrope_interleaved": True, **ROPE}},
        **QWEN_TOKENS,
    )


def _qwen_processor(name: str, video: str, patch: int) -> Callable[[Any, str], Any]:
    def build(tokens: Any, template: str) -> Any:
        cell = (2 * patch) ** 2
        cut = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
        # vLLM normalizes clips as it does images, so both are to say the same.
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        image_size = {"shortest_edge": 4 * cell, "longest_edge": 256 * cell}
        video_size = {"shortest_edge": 4 * cell, "longest_edge": 1024 * cell}
        return getattr(transformers, name)(
            transformers.Qwen2VLImageProcessor(size=image_size, **cut, **half),
            tokens,
            getattr(transformers, video)(size=video_size, **cut, **half),
            chat_template=template,
        )

    return build


CLIP_KEYS = ("vision_tower.", "vision_tower.vision_model.")
QWEN: dict[str, Any] = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "words": {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
    },
}

FAMILIES: dict[str, Family] = {
    "llava": Family(
        _llava_config, _llava_processor, "<image>", None, {IMAGE: "<image>"}, renamed=CLIP_KEYS
    ),
    "llava-next": Family(
        _llava_next_config,
        _llava_next_processor,
        "<image>",
        None,
        {IMAGE: "<image>"},
        renamed=CLIP_KEYS,
    ),
    "onevision": Family(
        _onevision_config,
        _onevision_processor,
        "<image>",
        "<video>",
        {IMAGE: "<image>", VIDEO: "<video>"},
        renamed=CLIP_KEYS,
    ),
    "internvl": Family(
        _internvl_config,
        _internvl_processor,
        "<IMG_CONTEXT>",
        "<video>",
        {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", VISION_START: "<img>", VISION_END: "</img>"},
        names={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "qwen2-vl": Family(
        _qwen2_vl_config,
        _qwen_processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor", 14),
        **QWEN,
    ),
    "qwen2.5-vl": Family(
        _qwen2_5_vl_config,
        _qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
        **QWEN,
    ),
    "qwen3-vl": Family(
        _qwen3_vl_config,
        _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
        **QWEN,
    ),
}


def save(name: str, folder: Path, config: Any = None) -> Path:
    """Write the checkpoint of a family.

    Args:
        name: a key of ``FAMILIES``.
        folder: where to; made if it is not there.
        config: in place of the family's own configuration, one of other sizes.

    Returns:
        The folder, which ``LLM(model=...)`` and ``from_pretrained`` read.
    """
    family = FAMILIES[name]
    config = family.config() if config is None else config
    model_class = transformers.AutoModelForImageTextToText._model_mapping[type(config)]
    model = lively(model_class(config))
    config.architectures = [model_class.__name__]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    ours, hub = family.renamed
    weights = {
        key if hub in key else key.replace(ours, hub): value.contiguous()
        for key, value in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    family.processor(tokenizer(family), family.template).save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 168, height: int = 168) -> Image.Image:
    """A mosaic of seven by seven colours."""
    colours = np.random.default_rng(seed).integers(0, 255, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def clip(
    seed: int, frames: int = 8, width: int = 112, height: int = 112
) -> tuple[np.ndarray, dict[str, Any]]:
    """A clip whose picture changes every other frame, and what vLLM wants to know of it."""
    pictures = [np.asarray(picture(100 * seed + i // 2, width, height)) for i in range(frames)]
    facts = {
        "fps": 2.0,
        "duration": frames / 2.0,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return np.stack(pictures), facts
