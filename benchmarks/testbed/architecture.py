"""The untrained testbed model and the attention used to train it on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenreduce_integrations.testbed.scenes import GRID_SIZE, IMAGE_SIZE, PATCH_SIZE
from tokenreduce_integrations.testbed.vocabulary import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    SCENE_WORDS,
    TOKEN_IDS,
    VIDEO,
    WORDS,
)

WIDTH = 128
HEADS = 4
NEW_LAYERS = 2
"""Layers that the language model of clips has before those that it inherits."""


def build_model() -> LlavaForConditionalGeneration:
    """Build the LLaVA model with random weights from the global torch generator."""
    config = LlavaConfig(
        vision_config=_vision_config(),
        text_config=_text_config(layers=4, words=len(SCENE_WORDS)),
        image_token_index=TOKEN_IDS[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID_SIZE**2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    _initialise(model)
    return model


def build_video_model() -> LlavaOnevisionForConditionalGeneration:
    """Build the LLaVA-OneVision model with random weights from the global torch generator.

    Its vision tower and projector have the shapes of the LLaVA model's. Frames are pooled two by
    two after the projector, and a clip ends in a newline. Its language model is two layers deeper.
    """
    config = LlavaOnevisionConfig(
        vision_config=_vision_config(),
        text_config=_text_config(layers=4 + NEW_LAYERS, words=len(WORDS)),
        image_token_index=TOKEN_IDS[IMAGE],
        video_token_index=TOKEN_IDS[VIDEO],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]],
        tie_word_embeddings=False,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    _initialise(model)
    return model


def start_from_pictures(
    model: LlavaOnevisionForConditionalGeneration, pictures: LlavaForConditionalGeneration
) -> None:
    """Copy what a model has learned from pictures into a new one for clips.

    The vision tower and the projector are copied as they are. The first `NEW_LAYERS` layers of the
    language model start as the identity, and the layers of the other model follow them.
    """
    source, target = pictures.model, model.model
    target.vision_tower.load_state_dict(source.vision_tower.state_dict())
    target.multi_modal_projector.load_state_dict(source.multi_modal_projector.state_dict())
    text, learned = target.language_model, source.language_model
    for layer in text.layers[:NEW_LAYERS]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    for layer, other in zip(text.layers[NEW_LAYERS:], learned.layers, strict=True):
        layer.load_state_dict(other.state_dict())
    text.norm.load_state_dict(learned.norm.state_dict())
    known = len(SCENE_WORDS)
    with torch.no_grad():
        text.embed_tokens.weight[:known] = learned.embed_tokens.weight
        model.lm_head.weight[:known] = pictures.lm_head.weight


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )


def _text_config(layers: int, words: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
        tie_word_embeddings=False,
    )


def _initialise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            # CLIP's own initialisation is scaled for widths of about a thousand.
            small = "position" in name or "embed" in name
            nn.init.trunc_normal_(parameter, std=0.02 if small else 0.06)


def register_training_attention() -> str:
    """Register plain batched-matmul attention with transformers and return its name.

    In bf16 on a CPU its backward pass is far cheaper than that of torch's fused attention, and the
    mask is shared by the batch.
    """
    name = "testbed_bmm"
    ALL_ATTENTION_FUNCTIONS.register(name, _bmm_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    return name


def _bmm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads, length, size = query.shape
    query = (query * (scaling or size**-0.5)).reshape(batch * heads, length, size)
    key = key.reshape(batch * heads, -1, size)
    value = value.reshape(batch * heads, -1, size)
    scores = torch.bmm(query, key.transpose(1, 2))
    if attention_mask is not None:
        masked = scores.view(batch, heads, length, -1) + attention_mask.to(scores.dtype)
        scores = masked.view(batch * heads, length, -1)
    weights = torch.softmax(scores, -1, dtype=scores.dtype)
    mixed = torch.bmm(weights, value).view(batch, heads, length, size)
    return mixed.transpose(1, 2).contiguous(), None
