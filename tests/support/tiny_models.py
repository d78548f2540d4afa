"""Real transformers models, built tiny from configs with weights that make logits of unit scale."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 200
PAD, BOS, IMAGE, VIDEO = 0, 1, 7, 8

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Item:
    """What a test knows of a visual item without asking the attachment.

    ``coords`` are (block, t, y, x) rows, ``protected`` the indices of structural tokens.
    """

    prompt: int
    token: int
    coords: list[tuple[int, int, int, int]]
    protected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Case:
    """A model with a batch of prompts.

    Attributes:
        decoder: path of the text decoder in the model.
        further: what the decoder reads beside embeddings, positions and a mask, for one shortened
            prompt: called with the model, the decoder's arguments in the unmodified prefill, the
            prompt's row, its kept columns, and the ids generated since.
        after_head: what the model makes of the logits of its head; called with its configuration.
        seq2seq: for an encoder-decoder, whose ``decoder`` is the text encoder: path of the module
            that predicts from what that encoder gives; empty for the model itself.
    """

    model: Any
    inputs: dict[str, Any]
    items: tuple[Item, ...]
    decoder: str = "model.language_model"
    further: Callable[[Any, dict[str, Any], int, Tensor, list[int]], dict[str, Any]] | None = None
    after_head: Callable[[Any, Tensor], Tensor] | None = None
    seq2seq: str | None = None

    def batch(self) -> dict[str, Any]:
        """The inputs, copied: models may change what they are given."""
        return {k: v.clone() if torch.is_tensor(v) else v for k, v in self.inputs.items()}


def grid(t: int, h: int, w: int, block: int = 0) -> list[tuple[int, int, int, int]]:
    return [(block, f, y, x) for f in range(t) for y in range(h) for x in range(w)]


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCABULARY, (count,), generator=generator).tolist()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[list[int]], side: str) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(longest - len(tokens), longest) if side == "left" else slice(len(tokens))
        ids[row, place] = torch.tensor(tokens)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def enable_checkpointing(model: Any) -> None:
    """Activation checkpointing, whose method was renamed within 5.x."""
    current = getattr(model, "activation_checkpointing_enable", None)
    (current or model.gradient_checkpointing_enable)()


def head_of(model: Any) -> Any:
    """The layer that gives logits."""
    return model.get_output_embeddings() or model.language_model.get_output_embeddings()


def lively(model: Any) -> Any:
    """Random weights of a scale that makes every token matter, and no placeholder is predicted."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                patchy = "embed" not in name or "patch" in name
                fan = parameter[0].numel() if patchy else parameter.shape[-1]
                scale = 8**0.5 if "embed_tokens" in name else 1.0
                sample = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(sample / fan**0.5 * scale)
            elif "bias" in name or "newline" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        head = head_of(model)
        head.weight[IMAGE] = 0
        head.weight[VIDEO] = 0
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = BOS
    return model.eval()


@functools.cache
def _llava() -> Any:
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    return lively(transformers.LlavaForConditionalGeneration(config))


def llava(side: str = "left") -> Case:
    """Two prompts of unequal length, one image each."""
    inputs = pad(
        [[BOS, *words(3, 1), *[IMAGE] * 16, *words(6, 2)], [BOS, *words(2, 3), *[IMAGE] * 16, 30]],
        side,
    )
    inputs["pixel_values"] = noise(2, 3, 56, 56)
    items = tuple(Item(prompt, IMAGE, grid(1, 4, 4)) for prompt in range(2))
    return Case(copy.deepcopy(_llava()), inputs, items)


def llava_several_images(side: str = "left") -> Case:
    """Three images (two adjacent) in the first prompt, one in the second, none in the third."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 32, *words(2, 8), *[IMAGE] * 16, *words(6, 2)],
            [BOS, *words(2, 3), *[IMAGE] * 16, *words(2, 4)],
            [BOS, *words(7, 5)],
        ],
        side,
    )
    inputs["pixel_values"] = noise(4, 3, 56, 56)
    items = tuple(Item(prompt, IMAGE, grid(1, 4, 4)) for prompt in (0, 0, 0, 1))
    return Case(copy.deepcopy(_llava()), inputs, items)


@functools.cache
def _onevision() -> Any:
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        tie_word_embeddings=False,
    )
    return lively(transformers.LlavaOnevisionForConditionalGeneration(config))


def onevision(side: str = "left") -> Case:
    """Two tiled images of different size, and a clip in the first prompt."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 88, *words(6, 2), *[VIDEO] * 13, *words(3, 9)],
            [BOS, *words(2, 3), *[IMAGE] * 52, *words(2, 4)],
        ],
        side,
    )
    inputs["pixel_values"] = noise(2, 5, 3, 56, 56)
    inputs["image_sizes"] = torch.tensor([[112, 112], [50, 100]])
    inputs["pixel_values_videos"] = noise(1, 3, 3, 56, 56, seed=2)
    square = grid(1, 4, 4)
    # 112 x 112 fills a mosaic of 8 x 8 patches, 50 x 100 one of 4 x 8; lines end in a newline.
    wide = [(1, 0, y, x) for y in range(8) for x in range(9)]
    low = [(1, 0, y, x) for y in range(4) for x in range(9)]
    newlines = tuple(16 + 9 * y + 8 for y in range(8))
    items = (
        Item(0, IMAGE, square + wide, newlines),
        Item(1, IMAGE, square + low, newlines[:4]),
        Item(0, VIDEO, [*grid(3, 2, 2), (0, 2, 1, 2)], (12,)),
    )
    return Case(copy.deepcopy(_onevision()), inputs, items)


@functools.cache
def _llava_next() -> Any:
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config={"model_type": "mistral", "sliding_window": None, "head_dim": 16, **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    return lively(transformers.LlavaNextForConditionalGeneration(config))


def llava_next(side: str = "left") -> Case:
    """Two tiled images of different size."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 88, *words(6, 2)],
            [BOS, *words(2, 3), *[IMAGE] * 52, *words(2, 4)],
        ],
        side,
    )
    inputs["pixel_values"] = noise(2, 5, 3, 56, 56)
    inputs["image_sizes"] = torch.tensor([[112, 112], [50, 100]])
    return Case(copy.deepcopy(_llava_next()), inputs, onevision().items[:2])


@functools.cache
def _llava_next_video() -> Any:
    config = transformers.LlavaNextVideoConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-2,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        spatial_pool_stride=2,
    )
    return lively(transformers.LlavaNextVideoForConditionalGeneration(config))


def llava_next_video_model() -> Any:
    return copy.deepcopy(_llava_next_video())


@functools.cache
def _internvl() -> Any:
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return lively(transformers.InternVLForConditionalGeneration(config))


def internvl(side: str = "left") -> Case:
    """An image of three tiles and one of two in the first prompt, one of two in the second."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 12, *words(2, 6), *[IMAGE] * 8, *words(6, 2)],
            [BOS, *words(2, 3), *[IMAGE] * 8, *words(2, 4)],
        ],
        side,
    )
    inputs["pixel_values"] = noise(7, 3, 56, 56)
    items = tuple(
        Item(prompt, IMAGE, [cell for block in range(tiles) for cell in grid(1, 2, 2, block)])
        for prompt, tiles in ((0, 3), (0, 2), (1, 2))
    )
    return Case(copy.deepcopy(_internvl()), inputs, items)


def internvl_single() -> Case:
    """One image that was not cut into tiles."""
    inputs = pad([[BOS, *words(3, 1), *[IMAGE] * 4, *words(6, 2)]], "left")
    inputs["pixel_values"] = noise(1, 3, 56, 56)
    return Case(copy.deepcopy(_internvl()), inputs, (Item(0, IMAGE, grid(1, 2, 2)),))


ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 9,
    "vision_end_token_id": 10,
    "tie_word_embeddings": False,
}


@functools.cache
def _qwen2_vl() -> Any:
    config = transformers.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config={"rope_parameters": ROPE, **TEXT},
        **QWEN_TOKENS,
    )
    return lively(transformers.Qwen2VLForConditionalGeneration(config))


@functools.cache
def _qwen3_vl() -> Any:
    config = transformers.Qwen3VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            "head_dim": 16,
            "rope_parameters": {"mrope_interleaved": True, **ROPE},
            **TEXT,
        },
        **QWEN_TOKENS,
    )
    return lively(transformers.Qwen3VLForConditionalGeneration(config))


@functools.cache
def _qwen2_5_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config={"rope_parameters": ROPE, **TEXT},
        **QWEN_TOKENS,
    )
    return lively(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen(model: Any, side: str, *, patch: int, clip: list[int]) -> Case:
    """Two images of different grids, and a clip of three frames in the first prompt."""
    image = [9, *[IMAGE] * 6, 10]
    inputs: dict[str, Any] = pad(
        [
            [BOS, *words(3, 1), *image, *words(4, 2), *clip, *words(4, 5)],
            [BOS, *words(2, 3), 9, *[IMAGE] * 8, 10, *words(3, 4)],
        ],
        side,
    )
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 8, 4]])
    inputs["video_grid_thw"] = torch.tensor([[3, 4, 4]])
    channels = 3 * 2 * patch * patch
    inputs["pixel_values"] = noise(4 * 6 + 8 * 4, channels)
    inputs["pixel_values_videos"] = noise(3 * 4 * 4, channels, seed=2)
    items = (
        Item(0, IMAGE, grid(1, 2, 3)),
        Item(1, IMAGE, grid(1, 4, 2)),
        Item(0, VIDEO, grid(3, 2, 2)),
    )
    return Case(copy.deepcopy(model), inputs, items)


def qwen2_vl(side: str = "left") -> Case:
    return qwen(_qwen2_vl(), side, patch=14, clip=[9, *[VIDEO] * 12, 10])


def qwen2_5_vl(side: str = "left") -> Case:
    case = qwen(_qwen2_5_vl(), side, patch=14, clip=[9, *[VIDEO] * 12, 10])
    case.inputs["second_per_grid_ts"] = torch.tensor([1.0])
    return case


def qwen3_vl(side: str = "left") -> Case:
    """A timestamp stands before each frame of the clip."""
    clip = [token for i in range(3) for token in [*words(2, 50 + i), 9, *[VIDEO] * 4, 10]]
    return qwen(_qwen3_vl(), side, patch=16, clip=clip)


CASES: dict[str, Callable[..., Case]] = {
    "llava": llava,
    "llava-several-images": llava_several_images,
    "llava-next": llava_next,
    "onevision": onevision,
    "internvl": internvl,
    "qwen2-vl": qwen2_vl,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
}
