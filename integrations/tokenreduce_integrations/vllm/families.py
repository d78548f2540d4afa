"""The model families of vLLM that TokenReduce serves, as data.

What a family needs beside its in-tree class: how its processor lays out the tokens of an item, and
where its vision tower attends. Nothing here imports vLLM.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from tokenreduce.errors import ServingError
from tokenreduce.plugins import installed
from tokenreduce_integrations.vllm.counting import rehearse
from tokenreduce_integrations.vllm.settings import (
    MODALITIES,
    QUERY_SIGNALS,
    SIGNALS,
    ServedStage,
)
from tokenreduce_integrations.vllm.shapes import Block, Shape

#: Signals that are read where a picture is encoded.
ENCODED: Final = SIGNALS - QUERY_SIGNALS
#: Before the name of an architecture, the name under which it is served with reduction.
PREFIX: Final = "TokenReduce"


@dataclass(frozen=True, kw_only=True)
class Processed:
    """An item as vLLM's processor left it.

    Attributes:
        info: the processor's knowledge of the model (vLLM's ``BaseProcessingInfo``).
        fields: the item's processed fields; each has its value in ``data``.
        tokens: placeholders that it has before reduction.
    """

    info: Any
    fields: Mapping[str, Any]
    tokens: int

    def shape_or_line(self, shape: Shape) -> Shape:
        """The shape if it has as many tokens as the item, else one that tells only their number."""
        return shape if len(shape) == self.tokens else Shape.line(self.tokens)


#: Where the tokens of a processed item lie.
ShapeOf = Callable[[Processed], Shape]
#: (model, signal ``(T, S, C)`` of T sequences of the tower, shape of each item, arguments of the
#: encoding call) -> the signal ``(N, C)`` of each item.
Pool = Callable[[Any, Tensor, Sequence[Shape], Mapping[str, Any]], list[Tensor]]

_SHALLOW_TOWER: Final = re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower of a family of models.

    Attributes:
        layers: the name of the module list of its layers.
        projector: the name of the module that reads its output.
        deep: from the model's configuration, the layer that signals are read from: the last whose
            output the projector reads, and in which whole pictures and frames attend.
        pool: from the tower's patches to the LLM's tokens.
        native: whether it encodes pictures of any size as one packed sequence.
        concatenated: from the configuration, how many patches the projector reads as one token's
            channels.
    """

    layers: str
    projector: str
    deep: Callable[[Any], int]
    pool: Pool
    native: bool = False
    concatenated: Callable[[Any], int] = lambda config: 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        architecture: the name by which checkpoints ask for the in-tree class.
        module: where that class is.
        class_name: its name, where that is another.
        shapes: of the items of each modality that it takes.
        tower: its vision tower.
        mrope: whether positions are those of time, height and width.
        embeds_text: modalities whose items have text between their tokens, of which nobody knows
            before encoding how many come before and after it.
    """

    architecture: str
    module: str
    shapes: Mapping[str, ShapeOf]
    tower: Tower
    class_name: str = ""
    mrope: bool = False
    embeds_text: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The architecture to ask vLLM for."""
        return PREFIX + self.architecture

    def weight_name(self, stored: str) -> str:
        """The name by which vLLM knows a weight.

        Towers of CLIP and SigLIP lie one module deeper in checkpoints of the hub than in those that
        transformers 5 writes; vLLM reads the former.

        Args:
            stored: its name in a checkpoint.
        """
        if not self.tower.layers.startswith("vision_tower.vision_model."):
            return stored
        return _SHALLOW_TOWER.sub(r"\1vision_tower.vision_model.", stored)

    def signals(self, config: Any, *, sharded_pictures: bool = False) -> frozenset[str]:
        """Names of the signals that models of a configuration give.

        Args:
            config: the model's configuration.
            sharded_pictures: whether each worker encodes other pictures than the rest.
        """
        if sharded_pictures:
            return QUERY_SIGNALS
        names = QUERY_SIGNALS | ENCODED
        if getattr(config.vision_config, "model_type", "") in _WITH_CLASS_TOKEN:
            return names
        return names - {"class_attention", "shallow_class_attention"}

    def require(self, stage: ServedStage, config: Any, *, sharded_pictures: bool = False) -> None:
        """Check that models of a configuration can serve a stage.

        Args:
            stage: the stage.
            config: the model's configuration.
            sharded_pictures: see :meth:`signals`.

        Raises:
            ServingError: if they lack a signal, take none of the stage's modalities, or have
                tokens of a width that does not suit the strategy.
        """
        reduced = [modality for modality in stage.modalities if modality in self.shapes]
        if not reduced:
            raise ServingError(
                f"{self.architecture} takes {', '.join(self.shapes)}, and only "
                f"{', '.join(stage.modalities)} is to be reduced: nothing would be."
            )
        offered = self.signals(config, sharded_pictures=sharded_pictures)
        missing = [name for name in stage.needs if name not in offered]
        if missing:
            would_work = [
                name
                for name, record in installed().strategies.items()
                if "projector" in record.sites
                and record.count == "exact"
                and offered.issuperset(record.needs)
            ]
            raise ServingError(
                f"strategy {stage.reducer().name!r} needs {', '.join(map(repr, missing))}, which "
                f"the vision tower of this {self.architecture} does not give (it gives "
                f"{', '.join(sorted(offered))}). What would work: {', '.join(would_work)}."
            )
        channels = config.get_text_config().hidden_size
        for modality in reduced:
            rehearse(stage.reducer(), channels, modality)


#: Types of vision towers that begin with a class token.
_WITH_CLASS_TOKEN = frozenset({"clip_vision_model", "intern_vit_6b", "internvl_vision"})


def whole_picture(processed: Processed) -> Shape:
    """Patches of a picture that is scaled to one size (LLaVA), perhaps behind a class token."""
    if "image_embeds" in processed.fields:
        return Shape.line(processed.tokens)
    side = processed.info.get_vision_encoder_info().get_patch_grid_length()
    picture = Shape.grid(1, side, side)
    if processed.tokens == len(picture) + 1:
        return Shape(blocks=picture.blocks, class_token=True)
    return processed.shape_or_line(picture)


def mosaic(processed: Processed) -> Shape:
    """A thumbnail, and the unpadded mosaic of tiles with a newline after each row (LLaVA-NeXT,
    LLaVA-OneVision)."""
    if "image_sizes" not in processed.fields:
        return Shape.line(processed.tokens)
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    encoder, config = processed.info.get_vision_encoder_info(), processed.info.get_hf_config()
    side = encoder.get_patch_grid_length()
    thumbnail = Block(rows=side, columns=side)
    if processed.tokens == side * side + 1:
        return Shape(blocks=(replace(thumbnail, newlines="end"),))
    height, width = processed.fields["image_sizes"].data.tolist()
    down, across = get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, encoder.get_image_size()
    )
    cells, rows = processed.info._get_num_unpadded_features(
        original_height=height,
        original_width=width,
        npatches=side,
        num_patch_height=down,
        num_patch_width=across,
    )
    tiles = Block(rows=rows, columns=cells // rows, newlines="rows")
    return processed.shape_or_line(Shape(blocks=(thumbnail, tiles)))


def pooled_frames(processed: Processed) -> Shape:
    """Pooled square frames of a clip, and one newline behind the last (LLaVA-OneVision)."""
    if "pixel_values_videos" not in processed.fields:
        return Shape.line(processed.tokens)
    frames = len(processed.fields["pixel_values_videos"].data)
    side = math.isqrt(processed.tokens // frames)
    clip = Block(frames=frames, rows=side, columns=side, newlines="end")
    return processed.shape_or_line(Shape(blocks=(clip,)))


def square_tiles(processed: Processed) -> Shape:
    """Square tiles of a picture, behind several of which a thumbnail of the whole (InternVL)."""
    if "image_num_patches" not in processed.fields:
        return Shape.line(processed.tokens)
    tiles = int(processed.fields["image_num_patches"].data)
    side = math.isqrt(processed.tokens // tiles)
    part = Block(rows=side, columns=side, whole=False)
    return Shape(blocks=(*[part] * (tiles - 1), replace(part, whole=True)))


def square_frames(processed: Processed) -> Shape:
    """Square frames of a clip, with text between them and each an item of its own (InternVL)."""
    frames = int(processed.fields["video_num_patches"].data)
    side = math.isqrt(processed.tokens // frames)
    return Shape(blocks=(Block(rows=side, columns=side),) * frames, apart=True)


def merged_patches(modality: str) -> ShapeOf:
    """Patches merged two by two, with the grid among the fields (Qwen-VL)."""

    def shape_of(processed: Processed) -> Shape:
        merge = processed.info.get_hf_config().vision_config.spatial_merge_size
        frames, rows, columns = processed.fields[f"{modality}_grid_thw"].data.tolist()
        return processed.shape_or_line(Shape.grid(frames, rows // merge, columns // merge))

    return shape_of


def feature_layer(config: Any) -> int:
    """The layer whose output the projector reads; of several the last that is named."""
    chosen = config.vision_feature_layer
    index = chosen if isinstance(chosen, int) else chosen[-1]
    # A positive number counts the embedding as well.
    return index - 1 if index > 0 else config.vision_config.num_hidden_layers + index


def full_attention_layer(config: Any) -> int:
    """The last layer in which whole pictures and frames attend."""
    vision = config.vision_config
    return int(max(getattr(vision, "fullatt_block_indexes", None) or [vision.depth - 1]))


def patches(
    model: Any, signal: Tensor, shapes: Sequence[Shape], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Patches reach the LLM one by one (LLaVA), perhaps without the class token before them."""
    return [row[len(row) - len(shape) :] for row, shape in zip(signal, shapes, strict=True)]


def packed_tiles(
    model: Any, signal: Tensor, shapes: Sequence[Shape], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """As features are packed, with zero for newlines (LLaVA-NeXT, LLaVA-OneVision)."""
    vision = model.config.vision_config
    patches_a_tile = (vision.image_size // vision.patch_size) ** 2
    signal = signal[:, signal.shape[1] - patches_a_tile :]
    newline = signal.new_zeros(signal.shape[-1])
    if "pixel_values_videos" in arguments:
        frames = [len(clip) for clip in arguments["pixel_values_videos"]]
        clips = model.apply_pooling(signal).split(frames)
        return [torch.cat([clip.flatten(0, 1), newline[None]]) for clip in clips]
    tiles = signal.split([len(picture) for picture in arguments["pixel_values"]])
    # The method reads nothing of a model but its configuration and its newline.
    stand_in = SimpleNamespace(config=model.config, image_newline=newline)
    named = inspect.signature(model._merge_image_patch_embeddings).parameters
    own = {"image_newline": newline} if "image_newline" in named else {}
    pack = type(model)._merge_image_patch_embeddings
    return [
        pack(stand_in, size, picture, strategy="spatial_unpad", **own)
        for size, picture in zip(arguments["image_sizes"], tiles, strict=True)
    ]


def shuffled(
    model: Any, signal: Tensor, shapes: Sequence[Shape], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Neighbouring patches become one token of more channels (InternVL)."""
    group, channels = patches_a_token(model.config), signal.shape[-1]
    side = math.isqrt(signal.shape[1] - 1)
    tiles = signal[:, 1:].reshape(-1, side, side, channels)
    tokens = model.pixel_shuffle(tiles, scale_factor=model.config.downsample_ratio)
    tokens = tokens.flatten(1, 2).unflatten(-1, (group, channels)).mean(2)
    return [item.flatten(0, 1) for item in tokens.split([len(shape.blocks) for shape in shapes])]


def patches_a_token(config: Any) -> int:
    """How many patches one token of the LLM holds (InternVL)."""
    return int(round(1 / config.downsample_ratio) ** 2)


def packed_grids(arguments: Mapping[str, Any]) -> list[list[int]]:
    """(frames, rows, columns) in patches of each item of an encoding call (Qwen-VL)."""
    grids = arguments.get("image_grid_thw", arguments.get("video_grid_thw"))
    return [] if grids is None else torch.as_tensor(grids).tolist()


def merged(
    model: Any, signal: Tensor, shapes: Sequence[Shape], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Patches merged two by two; they come in groups, by windows if the tower has any (Qwen-VL)."""
    tower = model.visual
    tokens = signal[0].unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
    if hasattr(tower, "get_window_index"):
        plan = tower.prepare_encoder_metadata(packed_grids(arguments))
        tokens = tokens[plan["reverse_indices"]]
    return list(tokens.split([len(shape) for shape in shapes]))


_LLAVA_TOWER: Final = Tower(
    layers="vision_tower.vision_model.encoder.layers",
    projector="multi_modal_projector",
    deep=feature_layer,
    pool=patches,
)
_TILED_TOWER: Final = replace(_LLAVA_TOWER, pool=packed_tiles)
_INTERN_TOWER: Final = Tower(
    layers="vision_model.encoder.layers",
    projector="mlp1",
    deep=lambda config: -1,
    pool=shuffled,
    concatenated=patches_a_token,
)
_QWEN_TOWER: Final = Tower(
    layers="visual.blocks",
    projector="visual.merger",
    deep=full_attention_layer,
    pool=merged,
    native=True,
)
_MERGED: Final = {modality: merged_patches(modality) for modality in MODALITIES}

_ALL = (
    Family(
        architecture="LlavaForConditionalGeneration",
        module="vllm.model_executor.models.llava",
        shapes={"image": whole_picture},
        tower=_LLAVA_TOWER,
    ),
    Family(
        architecture="LlavaNextForConditionalGeneration",
        module="vllm.model_executor.models.llava_next",
        shapes={"image": mosaic},
        tower=_TILED_TOWER,
    ),
    Family(
        architecture="LlavaOnevisionForConditionalGeneration",
        module="vllm.model_executor.models.llava_onevision",
        shapes={"image": mosaic, "video": pooled_frames},
        tower=_TILED_TOWER,
    ),
    Family(
        architecture="InternVLChatModel",
        module="vllm.model_executor.models.internvl",
        shapes={"image": square_tiles, "video": square_frames},
        tower=_INTERN_TOWER,
    ),
    Family(
        architecture="InternVLForConditionalGeneration",
        module="vllm.model_executor.models.interns1",
        class_name="InternS1ForConditionalGeneration",
        shapes={"image": square_tiles, "video": square_frames},
        tower=replace(
            _INTERN_TOWER,
            layers="vision_tower.encoder.layer",
            projector="multi_modal_projector",
        ),
    ),
    Family(
        architecture="Qwen2VLForConditionalGeneration",
        module="vllm.model_executor.models.qwen2_vl",
        shapes=_MERGED,
        tower=_QWEN_TOWER,
        mrope=True,
    ),
    Family(
        architecture="Qwen2_5_VLForConditionalGeneration",
        module="vllm.model_executor.models.qwen2_5_vl",
        shapes=_MERGED,
        tower=_QWEN_TOWER,
        mrope=True,
    ),
    Family(
        architecture="Qwen3VLForConditionalGeneration",
        module="vllm.model_executor.models.qwen3_vl",
        shapes=_MERGED,
        tower=_QWEN_TOWER,
        mrope=True,
        embeds_text=frozenset({"video"}),
    ),
)
#: By the name to ask vLLM for.
FAMILIES: Final[Mapping[str, Family]] = {family.name: family for family in _ALL}
