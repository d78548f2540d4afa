"""A tiny CLIP and a tiny SigLIP, and tokenizers whose words are numbers."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from support.tiny_models import BOS, CLIP, IMAGE, PAD, SIGLIP, VIDEO, VOCABULARY

TEXT_LENGTH = 8


def word_tokenizer(special: dict[str, int], *, framed: bool) -> Any:
    """A tokenizer of the words ``w0``, ``w1``, ... into themselves."""
    words = {f"w{i}": i for i in range(VOCABULARY) if i not in special.values()}
    model = models.WordLevel({**words, **special}, unk_token="<pad>")
    core = Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if framed:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", special["<s>"]), ("</s>", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>" if framed else None,
        additional_special_tokens=[n for n in special if n not in ("<pad>", "<s>", "</s>")],
    )


def llm_tokenizer() -> Any:
    """That of the tiny LLMs."""
    special = {"<pad>": PAD, "<s>": BOS, "<image>": IMAGE, "<video>": VIDEO}
    return word_tokenizer(special, framed=False)


@functools.cache
def tiny_clip() -> tuple[Any, Any]:
    """A CLIP whose tower has the shape of that of the tiny LLaVA, and its tokenizer."""
    return clip_with({key: value for key, value in CLIP.items() if key != "model_type"})


def clip_with(vision_config: dict[str, Any]) -> tuple[Any, Any]:
    """A CLIP with some tower, and its tokenizer."""
    torch.manual_seed(5)
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD,
        },
        vision_config=vision_config,
        projection_dim=20,
    )
    tokenizer = word_tokenizer({"<pad>": PAD, "<s>": 1, "</s>": 2}, framed=True)
    return transformers.CLIPModel(config).eval(), tokenizer


@functools.cache
def tiny_siglip() -> tuple[Any, Any]:
    """A SigLIP whose tower has the shape of that of the tiny LLaVA-OneVision, likewise."""
    torch.manual_seed(6)
    config = transformers.SiglipConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": TEXT_LENGTH,
        },
        vision_config={**SIGLIP, "vision_use_head": True},
    )
    tokenizer = word_tokenizer({"<pad>": PAD, "<s>": 1, "</s>": 2}, framed=True)
    return transformers.SiglipModel(config).eval(), tokenizer
