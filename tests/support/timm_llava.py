"""A LLaVA whose vision tower is a timm ViT, for the pictures and words of the testbed."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import transformers

from support.tiny_models import lively
from tokenreduce_integrations.testbed.models import model_path
from tokenreduce_integrations.testbed.vocabulary import TOKEN_IDS

TIMM = {"img_size": 96, "patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 4}


def timm_config(**changes: Any) -> transformers.LlavaConfig:
    vision = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=dict(TIMM),
        num_labels=0,
        hidden_size=TIMM["embed_dim"],
        do_pooling=False,
    )
    whole = transformers.AutoConfig.from_pretrained(model_path("b"))
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", **changes}
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=whole.text_config.to_dict(),
        image_token_index=TOKEN_IDS["<image>"],
        **options,
    )


@functools.cache
def _weights() -> Any:
    return lively(transformers.LlavaForConditionalGeneration(timm_config()))


def write_timm_llava(folder: Path) -> Path:
    """Write the model with the testbed's processor."""
    shutil.copytree(
        model_path("b"), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    _weights().save_pretrained(folder)
    return folder
