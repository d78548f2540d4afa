"""One tiny model of every family of transformers, shrunk from the family's own default config.

A :class:`Tiny` says what shrinking cannot guess: changed settings, and the visual input with what
each of its items should look like. The models are those of transformers, with random weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from support.tiny_models import (
    BOS,
    IMAGE,
    PAD,
    VIDEO,
    VOCABULARY,
    Case,
    Item,
    grid,
    head_of,
    lively,
    noise,
    pad,
    words,
)
from tokenreduce_integrations.transformers.release import oldest_release

START, END, AUDIO = 9, 10, 13
TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
    "audio_start_token_id": 14,
    "audio_end_token_id": 15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    **dict.fromkeys(("vision_start_token_id", "image_start_token_id", "boi_token_id"), START),
    **dict.fromkeys(("vision_end_token_id", "image_end_token_id", "eoi_token_id"), END),
    **dict.fromkeys(("boi_token_index", "video_start_token_id"), START),
    **dict.fromkeys(("eoi_token_index", "video_end_token_id"), END),
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "sliding_window": 64,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "word_embed_proj_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_sliding_attention_heads": 4,
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts"), 1),
}
VISION: dict[str, Any] = {
    "image_size": 56,
    "patch_size": 14,
    "num_position_embeddings": 64,
    "head_dim": 8,
    "out_hidden_size": 64,
    "output_dim": 64,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    **dict.fromkeys(("hidden_size", "embed_dim", "projection_dim", "encoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "mlp_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth"), 3),
    **dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 4),
}
# What configs derive from other settings; given the defaults of a large model they would disagree.
_DERIVED = {
    "layer_types", "mlp_layer_types", "per_layer_config", "transformers_version",
    "rope_parameters", "mlp_only_layers", "dtype", "architectures",
}  # fmt: skip
_TOWERS = ("vision", "visual", "sam", "high_res")

Settings = Mapping[str, Any]


def shrunk(default: Settings, changes: Settings, kind: str = "model") -> dict[str, Any]:
    """The settings of a config made small, with changes of one's own.

    Args:
        default: the config's own settings, nested.
        changes: nested as the config; taken as they stand.
        kind: ``"model"``, ``"text"``, ``"vision"`` or ``"audio"``.
    """
    small = {"model": TEXT, "text": TEXT, "vision": VISION, "audio": {}}[kind]
    settings: dict[str, Any] = {}
    for name, value in default.items():
        change = changes.get(name)
        if name in _DERIVED:
            continue
        if _nests(name, value):
            inner = _kind(name, kind)
            settings[name] = shrunk(value, change or {}, inner)
        elif name in TOKENS and kind != "audio":
            settings[name] = TOKENS[name]
        elif name in small and value is not None:
            settings[name] = small[name]
        else:
            settings[name] = value
    own = {k: v for k, v in changes.items() if v is None or not _nests(k, default.get(k))}
    return {**settings, **own}


def _nests(name: str, value: object) -> bool:
    return isinstance(value, dict) and ("config" in name or name in ("encoder", "decoder"))


def _kind(name: str, outer: str) -> str:
    if any(part in name for part in _TOWERS) or outer == "vision":
        return "vision"
    return "audio" if "audio" in name else "text"


@dataclass(frozen=True)
class Visual:
    """What goes into a model beside the text.

    Attributes:
        inputs: the processor's further outputs.
        items: prompt, modality token and coordinates of each item.
        stamps: whether a timestamp and markers surround each frame of a clip.
    """

    inputs: dict[str, Any]
    items: tuple[Item, ...]
    stamps: bool = False

    def run(self, item: Item) -> list[int]:
        """The tokens that stand for an item."""
        frames = 1
        if self.stamps:
            frames = len({t for _, t, _, _ in item.coords})
        each = len(item.coords) // frames
        stamp = words(2 if frames > 1 else 0, 50)
        return [*stamp, START, *[item.token] * each, END] * frames


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A tiny model and what is put into it.

    Attributes:
        model: class of transformers.
        visual: the visual input.
        changes: settings that shrinking cannot guess.
        decoder: path of the text decoder in the model.
        types: name under which the model reads the modality of each token, if it does.
        since: first release of transformers in which the unmodified model runs, if that is later
            than its class.
    """

    model: str
    visual: Callable[[], Visual]
    changes: Settings = field(default_factory=dict)
    decoder: str = "model.language_model"
    types: str | None = None
    further: Any = None
    after_head: Any = None
    seq2seq: str | None = None
    since: str = "5"

    @property
    def in_this_release(self) -> bool:
        """Whether the installed transformers has the model, in a form that is attached to."""
        installed = Version(Version(transformers.__version__).base_version)
        oldest = max(Version(self.since), Version(oldest_release(self.model)))
        return hasattr(transformers, self.model) and installed >= oldest

    def case(self, side: str = "left") -> Case:
        """Two prompts of unequal length."""
        visual = self.visual()
        rows = []
        for prompt, (before, after) in enumerate(((3, 6), (2, 2))):
            row = [BOS, *words(before, 1 + 2 * prompt)]
            for number, item in enumerate(i for i in visual.items if i.prompt == prompt):
                row += visual.run(item) + words(after, 2 + 2 * prompt + 10 * number)
            rows.append(row)
        inputs: dict[str, Any] = {**pad(rows, side), **visual.inputs}
        if self.types is not None:
            ids = inputs["input_ids"]
            image = 2 if "pixel_values" not in inputs else 1
            inputs[self.types] = image * (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return Case(
            copy.deepcopy(_built(self)),
            inputs,
            visual.items,
            self.decoder,
            self.further,
            self.after_head,
            self.seq2seq,
        )


def mllama() -> Case:
    """An image of two tiles in the first prompt, of one in the second, out of four places each.

    ``coords`` of the items begin each tile with its class token.
    """
    kind = transformers.MllamaForConditionalGeneration
    model = lively(kind(kind.config_class(**shrunk(kind.config_class().to_dict(), MLLAMA))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(1.0)
    inputs: dict[str, Any] = pad(
        [[BOS, IMAGE, *words(8, 1)], [BOS, *words(2, 2), IMAGE, *words(2, 3)]], "left"
    )
    ids = inputs["input_ids"]
    tiles = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]])
    after = ((ids == IMAGE).cumsum(1) > 0)[:, :, None, None]
    inputs["pixel_values"] = noise(2, 1, 4, 3, 56, 56) * tiles[..., None, None, None]
    inputs["aspect_ratio_mask"] = tiles
    inputs["aspect_ratio_ids"] = torch.tensor([[2], [1]])
    inputs["cross_attention_mask"] = (after & tiles[:, None].bool()).long()
    items = []
    for prompt, count in enumerate((2, 1)):
        coords = [
            place for tile in range(count) for place in [(tile, 0, 0, 0), *grid(1, 4, 4, tile)]
        ]
        items.append(Item(prompt, IMAGE, coords, tuple(range(0, len(coords), 17))))
    return Case(model, inputs, tuple(items))


_MODELS: dict[int, Any] = {}


def _built(tiny: Tiny) -> Any:
    """The model, built once."""
    if id(tiny) not in _MODELS:
        kind = getattr(transformers, tiny.model)
        settings = shrunk(kind.config_class().to_dict(), tiny.changes)
        torch.manual_seed(0)
        model = lively(kind(kind.config_class(**settings)))
        # Placeholders are never predicted.
        with torch.no_grad():
            head_of(model).weight[AUDIO] = 0
        _MODELS[id(tiny)] = model
    return _MODELS[id(tiny)]


def model_of(name: str) -> Any:
    """A model of :data:`TINY` without inputs."""
    return copy.deepcopy(_built(TINY[name]))


# -- visual inputs --------------------------------------------------------------------------------

Coords = list[tuple[int, int, int, int]]


def line(length: int) -> Coords:
    return grid(1, 1, length)


def images(coords: Coords, *shape: int) -> Callable[[], Visual]:
    """One image in each prompt, as ``pixel_values`` of one shape."""

    def visual() -> Visual:
        pixels = noise(2, *(shape or (3, 56, 56)))
        return Visual({"pixel_values": pixels}, tuple(Item(p, IMAGE, coords) for p in range(2)))

    return visual


def patches(
    *,
    patch: int = 14,
    temporal: int = 2,
    merge: int = 2,
    video: bool = True,
    channels: int = 3,
    frames: int = 1,
    stamps: bool = False,
) -> Callable[[], Visual]:
    """An image in each prompt and a clip in the first, as flat patches with grids (Qwen-VL).

    ``frames`` is how many frames of the grid make one of the LLM's; ``stamps`` puts each frame
    between markers of its own, after a timestamp.
    """

    def visual() -> Visual:
        width = channels * temporal * patch * patch
        inputs = {
            "pixel_values": noise(4 * 6 + 8 * 4, width),
            "image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 4]]),
        }
        items = [
            Item(0, IMAGE, grid(1, 4 // merge, 6 // merge)),
            Item(1, IMAGE, grid(1, 8 // merge, 4 // merge)),
        ]
        if video:
            inputs["pixel_values_videos"] = noise(2 * frames * 4 * 4, width, seed=2)
            inputs["video_grid_thw"] = torch.tensor([[2 * frames, 4, 4]])
            items.append(Item(0, VIDEO, grid(2, 4 // merge, 4 // merge)))
        return Visual(inputs, tuple(items), stamps)

    return visual


def and_more(visual: Callable[[], Visual], **inputs: Any) -> Callable[[], Visual]:
    """A visual input with further arguments."""

    def more() -> Visual:
        before = visual()
        return replace(before, inputs={**before.inputs, **inputs})

    return more


def square_pixels(visual: Callable[[], Visual]) -> Callable[[], Visual]:
    """The same patches, each as a picture of its own (Kimi)."""

    def unflattened() -> Visual:
        before = visual()
        inputs = {
            name: value.reshape(len(value), 3, 14, 14) if "pixel" in name else value
            for name, value in before.inputs.items()
        }
        return replace(before, inputs=inputs)

    return unflattened


def positioned_patches(side: int, width: int) -> Callable[[], Visual]:
    """``side * side`` flat patches with the place of each, a quarter as many tokens or as many
    (Gemma 4)."""

    def visual() -> Visual:
        places = [(x, y) for y in range(side) for x in range(side)]
        inputs = {
            "pixel_values": noise(2, side * side, width),
            "image_position_ids": torch.tensor([places, places]),
        }
        return Visual(inputs, tuple(Item(p, IMAGE, line(16)) for p in range(2)))

    return visual


def cubes() -> Visual:
    """Cubes of pixels, one token each (Inkling)."""
    pixels = noise(8, 2, 8, 8, 3)
    return Visual({"pixel_values": pixels}, tuple(Item(p, IMAGE, line(4)) for p in range(2)))


def token_pixels() -> Visual:
    """One picture for each token, with grids (Inkling 2)."""
    inputs = {
        "pixel_values": noise(14, 28, 28, 3),
        "image_grid_thw": torch.tensor([[1, 2, 3], [1, 4, 2]]),
    }
    return Visual(inputs, (Item(0, IMAGE, grid(1, 2, 3)), Item(1, IMAGE, grid(1, 4, 2))))


def separated_rows() -> Visual:
    """Patches whose rows end in a separator, between two boundary tokens (HunYuan)."""
    before = patches(temporal=1, video=False)()
    return replace(before, items=(Item(0, IMAGE, line(10)), Item(1, IMAGE, line(14))))


def strip(side: int) -> Callable[[], Visual]:
    """Patches of all images side by side in one strip (MiniCPM)."""

    def visual() -> Visual:
        inputs = {
            "pixel_values": noise(1, 3, 14, 14 * 2 * side * side),
            "target_sizes": torch.tensor([[side, side]] * 2),
        }
        return Visual(inputs, tuple(Item(p, IMAGE, line(4)) for p in range(2)))

    return visual


def tall_and_wide() -> Visual:
    """Two tiled images of different size (Granite 4 Vision)."""
    items = (Item(0, IMAGE, line(14)), Item(1, IMAGE, line(16)))
    return Visual({"pixel_values": noise(2, 3, 3, 56, 56)}, items)


def flat_grids() -> Visual:
    """Flat patches with two-dimensional grids (Nemotron)."""
    before = patches(temporal=1, video=False)()
    grids = before.inputs["image_grid_thw"]
    inputs = {"pixel_values": before.inputs["pixel_values"], "image_grid_hw": grids[:, 1:]}
    return replace(before, inputs=inputs, items=(Item(0, IMAGE, line(6)), Item(1, IMAGE, line(8))))


def clips_of_query_tokens() -> Visual:
    """A clip of two frames in each prompt, read with a question (InstructBLIP-Video)."""
    inputs = {
        "pixel_values": noise(2, 2, 3, 56, 56),
        "qformer_input_ids": torch.arange(20, 26).reshape(2, 3),
    }
    return Visual(inputs, tuple(Item(prompt, VIDEO, line(8)) for prompt in range(2)))


def clips_of_image_tokens() -> Visual:
    """A clip in each prompt, for which image tokens stand, each frame between markers (GLM-4V)."""
    inputs = {
        "pixel_values_videos": noise(2 * 2 * 4 * 4, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
    }
    return Visual(inputs, tuple(Item(prompt, IMAGE, grid(2, 2, 2)) for prompt in range(2)), True)


def cropped() -> Visual:
    """A whole picture and one crop of it in each prompt, with separators (Phi-4-multimodal)."""
    inputs = {
        "image_pixel_values": noise(2, 2, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 56]] * 2),
        "image_attention_mask": torch.ones(2, 2, 4, 4),
    }
    return Visual(inputs, tuple(Item(prompt, IMAGE, line(13)) for prompt in range(2)))


def tiles_and_clip() -> Visual:
    """Two tiled images and a clip (LLaVA-NeXT-Video)."""
    inputs = {
        "pixel_values": noise(2, 3, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 112], [112, 56]]),
        "pixel_values_videos": noise(1, 2, 3, 56, 56, seed=2),
    }
    items = (tiled(0, 4, 8), tiled(1, 8, 4), Item(0, VIDEO, grid(2, 2, 2)))
    return Visual(inputs, items)


def tiled(prompt: int, height: int, width: int) -> Item:
    """A thumbnail of 4 x 4 and a mosaic whose lines end in a newline."""
    mosaic = [(1, 0, y, x) for y in range(height) for x in range(width + 1)]
    newlines = tuple(16 + (width + 1) * y + width for y in range(height))
    return Item(prompt, IMAGE, grid(1, 4, 4) + mosaic, newlines)


# -- what models do after their head --------------------------------------------------------------


def softcapped(config: Any, logits: Tensor) -> Tensor:
    cap = config.get_text_config().final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def scaled_down(config: Any, logits: Tensor) -> Tensor:
    return logits / config.get_text_config().logits_scaling


def multiplied_and_softcapped(config: Any, logits: Tensor) -> Tensor:
    return softcapped(config, logits * config.get_text_config().output_multiplier)


def without_codes(config: Any, logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., list(CODES.values())] = torch.finfo(logits.dtype).min
    return logits


def narrowed(config: Any, logits: Tensor) -> Tensor:
    return logits / config.get_text_config().logits_mup_width_multiplier


# -- what decoders read beside embeddings ---------------------------------------------------------


def block_masks(
    *, of: str, windowed: bool, kinds: bool, full_causal: bool = False
) -> Callable[[Any, dict[str, Any], int, Tensor, list[int]], dict[str, Any]]:
    """Masks of a prompt in which blocks see themselves both ways, written out token by token.

    Args:
        of: ``"prompt"`` if everything but generated tokens is one block, else ``"images"``: each
            run of image tokens is one.
        windowed: whether a window cuts through blocks.
        kinds: whether the decoder takes one mask for each kind of attention.
        full_causal: whether blocks show in sliding layers only.
    """

    def further(
        model: Any, prefill: dict[str, Any], row: int, columns: Tensor, ids: list[int]
    ) -> dict[str, Any]:
        text = model.config.get_text_config()
        window = getattr(text, "sliding_window", None) or 10**9
        blocks = _blocks(prefill["input_ids"][row], columns, of) + [None] * len(ids)
        size = len(blocks)
        full = torch.zeros(1, 1, size, size, dtype=torch.bool)
        sliding = torch.zeros(1, 1, size, size, dtype=torch.bool)
        for q in range(size):
            for k in range(size):
                together = blocks[q] is not None and blocks[q] == blocks[k]
                near = k > q - window
                full[0, 0, q, k] = k <= q or (together and not full_causal)
                if windowed:
                    sliding[0, 0, q, k] = (k <= q or together) and near
                else:
                    sliding[0, 0, q, k] = (k <= q and near) or together
        mask = {"full_attention": full, "sliding_attention": sliding}
        return {"attention_mask": mask if kinds else full}

    return further


def _blocks(ids: Tensor, columns: Tensor, of: str) -> list[int | None]:
    """The block of each kept column: the number of its run of image tokens, or 0."""
    if of == "prompt":
        return [0] * len(columns)
    runs: list[int | None] = []
    number = -1
    for column, token in enumerate(ids.tolist()):
        visual = token in (IMAGE, VIDEO)
        if visual and (column == 0 or ids[column - 1] not in (IMAGE, VIDEO)):
            number += 1
        runs.append(number if visual else None)
    return [runs[column] for column in columns.tolist()]


def per_layer(
    model: Any, prefill: dict[str, Any], row: int, columns: Tensor, ids: list[int]
) -> dict[str, Any]:
    """Inputs for each layer: the prompt's, and those of generated tokens looked up."""
    inputs = prefill["per_layer_inputs"][row, columns][None]
    if ids:
        decoder = model.model.language_model
        token = torch.tensor([ids])
        arguments = (token, None) if model.config.model_type == "gemma4" else (token,)
        inputs = torch.cat([inputs, decoder.get_per_layer_inputs(*arguments)], 1)
    return {"per_layer_inputs": inputs}


def both(*parts: Any) -> Any:
    return lambda *arguments: {k: v for part in parts for k, v in part(*arguments).items()}


def rotary(*sections: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings with an axis for each section."""
    parameters = {"rope_type": "default", "mrope_section": list(sections), "rope_theta": 10000.0}
    return {"rope_parameters": {**parameters, **more}}


MROPE = rotary(2, 3, 3)

QFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
MLLAMA = {
    "text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "vocab_size": 200},
    "vision_config": {
        "attention_heads": 4,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 96,
        "max_num_tiles": 4,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    },
}
# Chameleon spells the number of a code with letters, A for zero.
CODES = {f"IMGIMG{'AB'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 100 + i for i in range(16)}
PHI4_AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
    "input_size": 8,
    "nemo_final_size": 1,
}
T5 = {
    "model_type": "t5",
    "is_encoder_decoder": True,
    "is_decoder": False,
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": PAD,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "relative_attention_num_buckets": 32,
}
LLAMA = {"vocab_size": VOCABULARY, "intermediate_size": 96, "num_key_value_heads": 2}

TINY: dict[str, Tiny] = {
    "aria": Tiny(
        model="AriaForConditionalGeneration",
        visual=images(line(4)),
        changes={
            "projector_patch_to_query_dict": {16: 4},
            "max_value_projector_patch_to_query_dict": 4,
        },
    ),
    "aya-vision": Tiny(model="AyaVisionForConditionalGeneration", visual=images(grid(1, 2, 2))),
    "cohere2-vision": Tiny(
        model="Cohere2VisionForConditionalGeneration",
        visual=images(grid(1, 2, 2)),
        changes={"alignment_intermediate_size": 64},
    ),
    "cohere-compass": Tiny(
        model="CohereCompassForConditionalGeneration",
        visual=patches(stamps=True),
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "rope_parameters": {
                    k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
                    for k in ("full_attention", "sliding_attention")
                }
            }
        },
    ),
    "cosmos3-edge": Tiny(
        model="Cosmos3EdgeForConditionalGeneration",
        visual=patches(temporal=1, stamps=True),
        types="mm_token_type_ids",
        changes={"text_config": MROPE, "projector_hidden_size": 64},
    ),
    "cosmos3-omni": Tiny(
        model="Cosmos3OmniForConditionalGeneration",
        visual=patches(stamps=True),
        types="mm_token_type_ids",
        changes={"text_config": MROPE},
    ),
    "deepseek-vl": Tiny(model="DeepseekVLForConditionalGeneration", visual=images(grid(1, 4, 4))),
    "deepseek-vl-hybrid": Tiny(
        model="DeepseekVLHybridForConditionalGeneration",
        visual=and_more(images(grid(1, 4, 4)), high_res_pixel_values=noise(2, 3, 64, 64)),
        changes={
            "high_res_vision_config": {
                "image_size": 64,
                "patch_size": 4,
                "global_attn_indexes": [1],
                "window_size": 8,
                "output_channels": 16,
                "num_pos_feats": 16,
            }
        },
    ),
    "deepseek-ocr2": Tiny(
        model="DeepseekOcr2ForConditionalGeneration",
        visual=images(line(145), 3, 256, 256),
        changes={
            "text_config": {
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 4,
                "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
            },
            "vision_config": {
                "sam_config": {
                    "image_size": 256,
                    "patch_size": 16,
                    "global_attn_indexes": [1],
                    "window_size": 8,
                    "output_channels": 16,
                    "downsample_channels": [16, 32],
                },
                "encoder_config": {"vocab_size": 8},
            },
        },
    ),
    "dots3-note": Tiny(
        model="Dots3NoteForConditionalGeneration",
        visual=patches(temporal=1),
        changes={
            "audio_config": {
                "adapter_out_dim": 64,
                "adapter_input_size": 16,
                "hidden_size": 16,
                "head_dim": 8,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 16,
            },
            "text_config": {
                "per_layer_config": None,
                "num_key_value_heads": 4,
                "index_topk": 512,
                "index_head_dim": 16,
                "index_n_heads": 4,
            },
            "vision_config": {
                "per_layer_config": None,
                "adapter_in_dim": 32,
                "adapter_out_dim": 64,
                "moe_intermediate_size": 32,
                "num_local_experts": 4,
            },
        },
    ),
    "ernie4.5-vl-moe": Tiny(
        model="Ernie4_5_VLMoeForConditionalGeneration",
        visual=patches(temporal=1, frames=2),
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "moe_intermediate_size": [32, 16],
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [3, 3, 2],
                    "rope_theta": 10000.0,
                },
            }
        },
    ),
    "exaone4.5": Tiny(model="Exaone4_5_ForConditionalGeneration", visual=patches()),
    "fast-vlm": Tiny(
        model="FastVlmForConditionalGeneration",
        visual=images(grid(1, 2, 2), 3, 128, 128),
        changes={
            "vision_config": {
                "hidden_size": 64,
                "model_args": {
                    "inference_mode": True,
                    "layers": [1, 1, 1, 1, 1],
                    "embed_dims": [8, 8, 16, 32, 32],
                },
            }
        },
    ),
    "fuyu": Tiny(
        model="FuyuForCausalLM",
        visual=images(line(4), 4, 48),
        changes={"patch_size": 4},
        decoder="model.language_model",
    ),
    "gemma3": Tiny(
        further=block_masks(of="images", windowed=True, kinds=True),
        after_head=softcapped,
        model="Gemma3ForConditionalGeneration",
        visual=images(grid(1, 2, 2)),
        types="token_type_ids",
        changes={"mm_tokens_per_image": 4},
    ),
    "gemma3n": Tiny(
        further=per_layer,
        after_head=softcapped,
        model="Gemma3nForConditionalGeneration",
        visual=images(grid(1, 2, 2)),
        types="token_type_ids",
        changes={
            "vision_soft_tokens_per_image": 4,
            "text_config": {
                "activation_sparsity_pattern": None,
                "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "laurel_rank": 8,
            },
            "vision_config": {
                "architecture": "test_resnet",
                "vocab_offset": VOCABULARY,
                "vocab_size": 1,
                "hidden_size": 96,
                "model_args": {},
            },
            "audio_config": {
                "hidden_size": 16,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "vocab_offset": VOCABULARY + 1,
                "vocab_size": 1,
            },
        },
    ),
    "gemma4": Tiny(
        further=per_layer,
        after_head=softcapped,
        model="Gemma4ForConditionalGeneration",
        visual=positioned_patches(8, 48),
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "global_head_dim": 16,
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
        },
    ),
    "gemma4-both-ways": Tiny(
        further=both(
            per_layer, block_masks(of="images", windowed=True, kinds=True, full_causal=True)
        ),
        after_head=softcapped,
        model="Gemma4ForConditionalGeneration",
        visual=positioned_patches(8, 48),
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "use_bidirectional_attention": "vision",
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "global_head_dim": 16,
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
        },
    ),
    "gemma4-unified": Tiny(
        further=block_masks(of="images", windowed=False, kinds=True),
        after_head=softcapped,
        model="Gemma4UnifiedForConditionalGeneration",
        visual=positioned_patches(4, 192),
        types="mm_token_type_ids",
        changes={
            "text_config": {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "vision_config": {
                "model_type": "gemma4_unified_vision",
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 64,
                "mm_posemb_size": 16,
                "output_proj_dims": 64,
            },
        },
    ),
    "glm46v": Tiny(
        model="Glm46VForConditionalGeneration",
        visual=patches(video=False),
        types="mm_token_type_ids",
        changes={"text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)}},
    ),
    "glm4v-video": Tiny(
        model="Glm4vForConditionalGeneration",
        visual=clips_of_image_tokens,
        types="mm_token_type_ids",
        changes={"text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)}},
    ),
    "glm4v": Tiny(
        model="Glm4vForConditionalGeneration",
        visual=patches(video=False),
        types="mm_token_type_ids",
        changes={"text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)}},
    ),
    "glm4v-moe": Tiny(
        model="Glm4vMoeForConditionalGeneration",
        visual=patches(video=False),
        types="mm_token_type_ids",
        changes={"text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)}},
    ),
    "glm5-next": Tiny(
        model="Glm5NextForConditionalGeneration",
        visual=patches(video=False),
        types="mm_token_type_ids",
        changes={
            "video_start_token_id": 11,
            "video_end_token_id": 12,
            "text_config": {
                "num_key_value_heads": 4,
                "qk_rope_head_dim": 0,
                "linear_head_dim": 16,
                "linear_num_heads": 4,
                "hc_sinkhorn_iters": 2,
                "index_topk": 512,
                "index_head_dim": 16,
                "index_n_heads": 4,
            },
        },
    ),
    "glm-ocr": Tiny(
        model="GlmOcrForConditionalGeneration",
        visual=patches(video=False),
        types="mm_token_type_ids",
        changes={"text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)}},
    ),
    "got-ocr2": Tiny(
        model="GotOcr2ForConditionalGeneration",
        visual=images(grid(1, 4, 4), 3, 256, 256),
        changes={
            "vision_config": {
                "image_size": 256,
                "patch_size": 16,
                "global_attn_indexes": [1],
                "window_size": 8,
                "output_channels": 16,
            }
        },
    ),
    "granite4-vision": Tiny(
        after_head=scaled_down,
        model="Granite4VisionForConditionalGeneration",
        visual=and_more(tall_and_wide, image_sizes=torch.tensor([[56, 112], [112, 56]])),
        changes={
            "vision_config": {"hidden_size": 64},
            "downsample_rate": "2/4",
            "deepstack_layer_map": [[1, 0], [2, 1]],
            "spatial_target_layers": [2, 3],
            "image_grid_pinpoints": [[56, 112], [112, 56]],
            "qformer_config": {
                "hidden_size": 64,
                "encoder_hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            },
        },
    ),
    "granite-docling": Tiny(
        after_head=scaled_down,
        model="GraniteDoclingForConditionalGeneration",
        visual=and_more(
            images(line(4), 1, 3, 56, 56),
            pixel_attention_mask=torch.ones(2, 1, dtype=torch.bool),
        ),
        decoder="model.text_model",
        changes={"vision_config": {"scale_factor": 2}},
    ),
    "hunyuan-vl": Tiny(
        model="HunYuanVLForConditionalGeneration",
        visual=separated_rows,
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 2, 2, 2],
                },
            },
            "vision_config": {"text_hidden_size": 64},
        },
    ),
    "hyperclovax-vision-v2": Tiny(
        model="HyperCLOVAXVisionV2ForConditionalGeneration", visual=patches()
    ),
    "idefics2": Tiny(
        model="Idefics2ForConditionalGeneration",
        visual=images(line(4), 1, 3, 56, 56),
        decoder="model.text_model",
        changes={
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_n_heads": 4,
                "resampler_head_dim": 16,
                "num_key_value_heads": 2,
            }
        },
    ),
    "idefics3": Tiny(
        model="Idefics3ForConditionalGeneration",
        visual=images(line(4), 1, 3, 56, 56),
        decoder="model.text_model",
    ),
    "inkling": Tiny(
        after_head=narrowed,
        model="InklingForConditionalGeneration",
        visual=cubes,
        changes={
            "text_config": {
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 16,
                "sliding_window_size": 64,
                "rel_extent": 64,
            },
            "vision_config": {"text_hidden_size": 64, "n_layers": 2, "patch_size": 8},
            "audio_config": {"text_hidden_size": 64, "mel_vocab_size": 8},
        },
    ),
    "inkling2": Tiny(
        after_head=softcapped,
        model="Inkling2ForConditionalGeneration",
        visual=token_pixels,
        changes={
            "text_config": {
                "swa_num_attention_heads": 4,
                "swa_num_key_value_heads": 2,
                "swa_head_dim": 16,
                "sliding_window_size": 64,
                "rel_extent": 64,
            },
            "vision_config": {"text_hidden_size": 64, "projection_hidden_dim": 64},
        },
    ),
    "janus": Tiny(
        model="JanusForConditionalGeneration",
        visual=images(grid(1, 4, 4)),
        changes={
            "vision_config": {"projection_dim": 64, "num_image_tokens": 16},
            "vq_config": {
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_patches": 4,
                "projection_dim": 64,
                "image_token_embed_dim": 64,
                "embed_dim": 8,
                "num_hidden_layers": 1,
            },
        },
    ),
    "kimi-k2.5": Tiny(
        model="Kimi_K25ForConditionalGeneration",
        visual=square_pixels(patches(temporal=1, video=False)),
        changes={
            "projection_hidden_size": 32,
            "text_config": {
                "head_dim": 8,
                "num_key_value_heads": 4,
                "n_group": 1,
                "topk_group": 1,
            },
        },
    ),
    "lfm2-vl": Tiny(
        model="Lfm2VlForConditionalGeneration",
        visual=and_more(
            images(line(4), 16, 588),
            spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
            pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        ),
        changes={
            "vision_config": {"num_patches": 16},
            "text_config": {
                "full_attn_idxs": None,
                "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            },
            "projector_hidden_size": 64,
        },
    ),
    "lfm3-vl": Tiny(model="Lfm3VlForConditionalGeneration", visual=patches()),
    "lighton-ocr": Tiny(
        model="LightOnOcrForConditionalGeneration",
        visual=and_more(images(grid(1, 2, 2)), image_sizes=torch.tensor([[56, 56], [56, 56]])),
    ),
    "llama4": Tiny(
        model="Llama4ForConditionalGeneration",
        visual=images(grid(1, 2, 2)),
        decoder="language_model.model",
        changes={
            "text_config": {
                "intermediate_size_mlp": 96,
                "moe_layers": None,
                "no_rope_layers": None,
                "attention_chunk_size": 512,
            },
            "vision_config": {
                "intermediate_size": 128,
                "vision_output_dim": 48,
                "projector_input_dim": 48,
                "projector_output_dim": 48,
            },
        },
    ),
    "llava-next-video": Tiny(
        model="LlavaNextVideoForConditionalGeneration",
        visual=tiles_and_clip,
        changes={"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112]]},
    ),
    "minicpm-ocr": Tiny(model="MiniCPMOcrForConditionalGeneration", visual=strip(4)),
    "minicpm-v4.6": Tiny(
        model="MiniCPMV4_6ForConditionalGeneration",
        visual=strip(8),
        changes={"vision_config": {"image_size": 112}},
    ),
    "minicpm-v4.7": Tiny(
        model="MiniCPMV4_7ForConditionalGeneration",
        visual=strip(8),
        changes={"vision_config": {"image_size": 112}},
        types="mm_token_type_ids",
    ),
    "minimax-m3-vl": Tiny(
        model="MiniMaxM3SparseForConditionalGeneration",
        visual=patches(),
        changes={
            "projector_hidden_size": 64,
            "merged_hidden_size": 256,
            "text_config": {
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 32,
                "rotary_dim": 16,
                "index_head_dim": 16,
                "index_block_size": 16,
            },
        },
    ),
    "mistral3": Tiny(
        model="Mistral3ForConditionalGeneration",
        visual=and_more(images(grid(1, 2, 2)), image_sizes=torch.tensor([[56, 56], [56, 56]])),
    ),
    "mistral-large4": Tiny(
        after_head=softcapped,
        model="MistralLarge4ForConditionalGeneration",
        visual=and_more(images(grid(1, 2, 2)), image_sizes=torch.tensor([[56, 56], [56, 56]])),
        changes={
            "text_config": {
                "kv_source_layers": None,
                "indexer_types": None,
                "no_rope_layers": None,
                "num_key_value_heads": 4,
                "index_topk": 512,
                "index_head_dim": 16,
                "index_n_heads": 4,
                "qk_head_dim": 16,
            }
        },
    ),
    "molmo2": Tiny(
        further=block_masks(of="images", windowed=False, kinds=False),
        model="Molmo2ForConditionalGeneration",
        visual=and_more(
            images(line(4), 16, 588),
            image_token_pooling=torch.arange(32).reshape(8, 4),
            image_grids=torch.tensor([[2, 2, 0, 0]] * 2),
        ),
        types="mm_token_type_ids",
        changes={
            "vision_config": {"image_size": [56, 56], "num_position_embeddings": 16, "head_dim": 8},
            "adapter_config": {
                "vision_feature_layer": [-1, -2],
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 48,
                "text_hidden_size": 64,
            },
            "text_config": {"rope_scaling_layers": None},
            "image_patch_id": IMAGE,
        },
    ),
    "muse-glimmer": Tiny(
        after_head=multiplied_and_softcapped,
        model="MuseGlimmerForConditionalGeneration",
        visual=patches(),
        changes={
            "text_config": {"layer_rope_theta": None, "moe_hidden_size": 32},
            "out_hidden_size": 128,
            "projector_hidden_size": 64,
            "vision_config": {
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "max_position_embeddings": 64,
            },
        },
    ),
    "muse-spark": Tiny(
        after_head=multiplied_and_softcapped,
        model="MuseSparkForConditionalGeneration",
        visual=patches(),
        changes={
            "text_config": {"layer_rope_theta": None, "moe_hidden_size": 32},
            "out_hidden_size": 128,
            "projector_hidden_size": 64,
            "vision_config": {
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "max_position_embeddings": 64,
            },
            "audio_config": {
                "out_hidden_size": 64,
                "hidden_sizes": [8, 8, 8, 8],
                "depths": [1, 1, 1, 1],
            },
        },
    ),
    "nemotron-h-omni": Tiny(
        model="NemotronH_Omni_Reasoning_V3",
        visual=flat_grids,
        decoder="language_model.model",
        changes={
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "projector_hidden_size": 64,
            "vision_hidden_size": 32,
            "text_config": {
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "ssm_state_size": 16,
                "n_groups": 2,
                "moe_shared_expert_intermediate_size": 32,
            },
            "vision_config": {"max_img_size": 112, "patch_dim": 588, "video_patch_dim": 1176},
        },
    ),
    "ovis2": Tiny(
        model="Ovis2ForConditionalGeneration",
        visual=images(grid(1, 2, 2)),
        changes={
            "vision_config": {
                "hidden_stride": 2,
                "vocab_size": 48,
                "num_visual_indicator_tokens": 5,
            },
            "visual_indicator_token_ids": [191, 192, 193, 194, 195],
        },
    ),
    "paddleocr-vl": Tiny(
        model="PaddleOCRVLForConditionalGeneration",
        visual=square_pixels(patches(temporal=1, video=False)),
        types="mm_token_type_ids",
        changes={"text_config": MROPE},
    ),
    "paligemma": Tiny(
        further=block_masks(of="prompt", windowed=False, kinds=False),
        model="PaliGemmaForConditionalGeneration",
        visual=and_more(images(grid(1, 4, 4)), token_type_ids=torch.zeros(2, 30, dtype=torch.long)),
        types=None,
        changes={"projection_dim": 64, "vision_config": {"projection_dim": 64}},
    ),
    "perception-lm": Tiny(
        model="PerceptionLMForConditionalGeneration",
        visual=images(grid(1, 4, 4), 1, 3, 56, 56),
        changes={
            "vision_config": {
                "architecture": "vit_pe_core_tiny_patch16_384",
                "model_args": {
                    "embed_dim": 32,
                    "depth": 2,
                    "num_heads": 4,
                    "img_size": 56,
                    "patch_size": 14,
                    "use_post_transformer_norm": False,
                    "global_pool": "",
                },
            }
        },
    ),
    "qianfan-ocr": Tiny(model="QianfanOCRForConditionalGeneration", visual=images(grid(1, 2, 2))),
    "qwen2.5-omni": Tiny(
        model="Qwen2_5OmniThinkerForConditionalGeneration",
        visual=and_more(patches(), video_second_per_grid=torch.tensor([1.0])),
        changes={
            "vision_start_token_id": START,
            "text_config": MROPE,
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "num_mel_bins": 16,
                "output_dim": 64,
                "downsample_hidden_size": 16,
                "num_hidden_layers": 1,
            },
        },
    ),
    "qwen3.5": Tiny(
        model="Qwen3_5ForConditionalGeneration",
        visual=patches(stamps=True, patch=16),
        types="mm_token_type_ids",
        changes={
            "vision_config": {"patch_size": 16},
            "text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)},
        },
    ),
    "qwen3.5-moe": Tiny(
        model="Qwen3_5MoeForConditionalGeneration",
        visual=patches(stamps=True, patch=16),
        types="mm_token_type_ids",
        changes={
            "vision_config": {"patch_size": 16},
            "text_config": {**rotary(2, 3, 3, partial_rotary_factor=1.0)},
        },
    ),
    "qwen3-omni": Tiny(
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        visual=and_more(patches(), video_second_per_grid=torch.tensor([1.0])),
        changes={
            "vision_start_token_id": START,
            "text_config": MROPE,
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "d_model": 16,
                "num_mel_bins": 16,
                "output_dim": 64,
                "downsample_hidden_size": 16,
                "num_hidden_layers": 1,
            },
        },
    ),
    "qwen3-vl-moe": Tiny(
        model="Qwen3VLMoeForConditionalGeneration",
        visual=patches(stamps=True),
        types="mm_token_type_ids",
        changes={"text_config": MROPE},
    ),
    "qwen4-exp": Tiny(
        model="Qwen4ExpForConditionalGeneration",
        visual=patches(stamps=True),
        types="mm_token_type_ids",
        changes={
            "text_config": {
                "hc_lowrank": 16,
                "ple_embed_dim": 32,
                "ngram_vocab_size_base": 500,
                "make_ngram_vocab_size_divisible_by": 4,
                "split_ngram_parts": 4,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 16,
                "indexer_budget": 512,
                "indexer_compress_ratio": 4,
                **MROPE,
            }
        },
    ),
    "smolvlm": Tiny(
        model="SmolVLMForConditionalGeneration",
        visual=images(line(4), 1, 3, 56, 56),
        decoder="model.text_model",
    ),
    "step3.7": Tiny(
        model="Step3p7ForConditionalGeneration",
        visual=images(line(4), 3, 112, 112),
        changes={"vision_config": {"image_size": 112}, "text_config": {"sliding_window": 64}},
    ),
    "unlimited-ocr": Tiny(
        model="UnlimitedOcrForConditionalGeneration",
        visual=images(line(21), 3, 64, 64),
        changes={
            "vision_config": {
                "sam_config": {
                    "image_size": 64,
                    "patch_size": 4,
                    "global_attn_indexes": [1],
                    "window_size": 8,
                    "output_channels": 16,
                    "downsample_channels": [16, 32],
                },
                "encoder_config": {"image_size": 56},
            }
        },
    ),
    "video-llama3": Tiny(
        model="VideoLlama3ForConditionalGeneration",
        visual=and_more(
            patches(temporal=1),
            image_merge_sizes=torch.tensor([2, 2]),
            video_merge_sizes=torch.tensor([2]),
        ),
    ),
    "video-llava": Tiny(model="VideoLlavaForConditionalGeneration", visual=images(line(16))),
    "vip-llava": Tiny(
        model="VipLlavaForConditionalGeneration",
        visual=images(grid(1, 4, 4)),
        changes={"vision_feature_layer": [-2, 1]},
        since="5.23",
    ),
    "instructblip-vicuna": Tiny(
        model="InstructBlipForConditionalGeneration",
        visual=and_more(images(line(4)), qformer_input_ids=torch.arange(20, 26).reshape(2, 3)),
        decoder="language_model.model",
        changes={
            "text_config": {**LLAMA, "model_type": "llama"},
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
        },
    ),
    "instructblip-video": Tiny(
        model="InstructBlipVideoForConditionalGeneration",
        visual=clips_of_query_tokens,
        decoder="language_model.model",
        changes={
            "text_config": {**LLAMA, "model_type": "llama"},
            "qformer_config": QFORMER,
            "num_query_tokens": 4,
        },
    ),
    "blip2-opt": Tiny(
        model="Blip2ForConditionalGeneration",
        visual=images(line(4)),
        decoder="language_model.model.decoder",
        changes={"qformer_config": QFORMER, "num_query_tokens": 4},
    ),
    "instructblip-t5": Tiny(
        model="InstructBlipForConditionalGeneration",
        visual=and_more(images(line(4)), qformer_input_ids=torch.arange(20, 26).reshape(2, 3)),
        decoder="language_model.encoder",
        seq2seq="language_model",
        changes={"text_config": T5, "qformer_config": QFORMER, "num_query_tokens": 4},
    ),
    "blip2-t5": Tiny(
        model="Blip2ForConditionalGeneration",
        visual=images(line(4)),
        decoder="language_model.encoder",
        seq2seq="language_model",
        changes={"text_config": T5, "qformer_config": QFORMER, "num_query_tokens": 4},
    ),
    "florence2": Tiny(
        model="Florence2ForConditionalGeneration",
        visual=images(line(5), 3, 64, 64),
        decoder="model.language_model.encoder",
        seq2seq="",
        changes={
            "text_config": {
                "d_model": 64,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "forced_eos_token_id": None,
                "decoder_start_token_id": 2,
            },
            "vision_config": {
                "patch_size": [7, 3, 3, 3],
                "embed_dim": [16, 16, 32, 32],
                "num_heads": [2, 2, 2, 2],
                "num_groups": [2, 2, 2, 2],
                "depths": [1, 1, 1, 1],
                "window_size": 2,
                "projection_dim": 64,
            },
        },
    ),
    "phi4-multimodal": Tiny(
        model="Phi4MultimodalForCausalLM",
        visual=cropped,
        decoder="model",
        changes={
            "resid_pdrop": 0.0,
            "original_max_position_embeddings": 2048,
            "vision_config": {"crop_size": 56, "image_token_id": IMAGE, "image_size": 56},
            "audio_config": PHI4_AUDIO,
        },
    ),
    "chameleon": Tiny(
        model="ChameleonForConditionalGeneration",
        visual=images(line(16), 3, 32, 32),
        decoder="model",
        after_head=without_codes,
        changes={
            "vocabulary_map": {**CODES, "<image>": IMAGE},
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "latent_channels": 8,
                "resolution": 32,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
            },
        },
    ),
    "emu3": Tiny(
        model="Emu3ForConditionalGeneration",
        visual=and_more(images(line(20), 3, 32, 32), image_sizes=torch.tensor([[32, 32]] * 2)),
        decoder="model.text_model",
        changes={
            "vocabulary_map": {
                **{f"<|visual token {i:06d}|>": 100 + i for i in range(16)},
                "<|extra_200|>": 120,
                "<image>": IMAGE,
            },
            "vq_config": {
                "codebook_size": 16,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "hidden_size": 32,
            },
        },
    ),
}
