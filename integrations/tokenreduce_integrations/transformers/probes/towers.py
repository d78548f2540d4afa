"""Where a vision tower attends, and what its projector reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenreduce_integrations.transformers.observed_attention import observable

#: The part of a tower's depth at which attention is called shallow.
SHALLOW = 4


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower as signals see it.

    Attributes:
        projector: the module that reads the tower's output.
        deep: attention of the layer that signals are read from; None if it cannot be read.
        shallow: attention of an early layer, likewise.
        has_class_token: whether a class token comes first in the tower's sequence.
        packed: whether all items are one sequence, attended segment by segment.
        concatenated: how many patches the projector reads as one token's channels.
        vision_config: the tower's configuration.
    """

    projector: nn.Module
    deep: nn.Module | None
    shallow: nn.Module | None
    has_class_token: bool = False
    packed: bool = False
    concatenated: int = 1
    vision_config: Any = None


def image_tower(owner: Any) -> Tower:
    """A tower that encodes each picture, tile or frame as one sequence (CLIP, SigLIP, InternViT,
    DINOv2, timm's ViTs).

    Deep is the layer whose output the projector reads (of several, the last), shallow the one at a
    quarter of the depth: index 5 of the 24 layers of CLIP ViT-L.
    """
    tower, config = owner.vision_tower, owner.config
    encoder, embeddings = getattr(tower, "encoder", None), getattr(tower, "embeddings", None)
    layers = getattr(encoder, "layers", None) or getattr(encoder, "layer", None) or ()
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of layer i - 1.
    first = 1
    if (inner := getattr(tower, "timm_model", None)) is not None:
        # timm's begin with the output of the first block.
        embeddings, layers, first = inner, getattr(inner, "blocks", ()), 0
    names = ("vision_feature_layer", "vision_feature_layers")
    chosen: Any = next((getattr(config, n) for n in names if hasattr(config, n)), -1)
    index = chosen if isinstance(chosen, int) else chosen[-1]
    ratio = getattr(config, "downsample_ratio", 1)
    return Tower(
        projector=owner.multi_modal_projector,
        deep=None if 0 <= index < first else _attention(layers, index - first * (index >= 0)),
        shallow=_attention(layers, max(0, len(layers) // SHALLOW - 1)),
        has_class_token=any(
            getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token")
        ),
        concatenated=round(1 / ratio) ** 2,
        vision_config=tower.config,
    )


def native_tower(owner: Any) -> Tower:
    """A tower that encodes pictures and frames of any size as one packed sequence (Qwen-VL).

    Deep is the last layer in which whole pictures and frames attend, which is the last of all
    where no layer attends in windows. There is no class token.
    """
    tower = owner.visual
    full = getattr(tower, "fullatt_block_indexes", None) or [len(tower.blocks) - 1]
    return Tower(
        projector=tower.merger,
        deep=_attention(tower.blocks, max(full)),
        shallow=None,
        packed=True,
        vision_config=tower.config,
    )


def _attention(layers: Any, index: int) -> nn.Module | None:
    """The one module of a layer that attends, if its queries and keys can be read."""
    if not -len(layers) <= index < len(layers):
        return None
    found = [module for module in layers[index].modules() if observable(module)]
    return found[0] if len(found) == 1 else None
