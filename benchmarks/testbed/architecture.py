"""The untrained testbed model and the attention used to train it on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenreduce_integrations.testbed.scenes import GRID_SIZE, IMAGE_SIZE, PATCH_SIZE
from tokenreduce_integrations.testbed.vocabulary import BOS, EOS, IMAGE, PAD, TOKEN_IDS, WORDS

WIDTH = 128
HEADS = 4


def build_model() -> LlavaForConditionalGeneration:
    """Build the LLaVA model with random weights from the global torch generator."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=TOKEN_IDS[IMAGE],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=GRID_SIZE**2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "norm" not in name:
            # CLIP's own initialisation is scaled for widths of about a thousand.
            small = "position" in name or "embed" in name
            nn.init.trunc_normal_(parameter, std=0.02 if small else 0.06)
    return model


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
