"""The model families of vLLM that TokenReduce serves, as data.

What a family needs beside its in-tree class: how its processor lays out the tokens of an item, and
where its vision tower attends. Nothing here imports vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from tokenreduce.errors import ServingError
from tokenreduce.plugins import installed
from tokenreduce_integrations.vllm.settings import MODALITIES, ServedStage
from tokenreduce_integrations.vllm.shapes import Shape

#: Before the name of an architecture, the name under which it is served with reduction.
PREFIX: Final = "TokenReduce"


@dataclass(frozen=True, kw_only=True)
class Processed:
    """An item as vLLM's processor left it.

    Attributes:
        info: the processor's knowledge of the model (vLLM's ``BaseProcessingInfo``).
        items: the media of the item's modality, before they were processed.
        fields: the item's processed fields; each has its value in ``data``.
        index: which of the media it is.
        tokens: placeholders that it has before reduction.
    """

    info: Any
    items: Any
    fields: Mapping[str, Any]
    index: int
    tokens: int


#: Where the tokens of a processed item lie.
ShapeOf = Callable[[Processed], Shape]
#: (model, signal ``(T, S, C)`` of T sequences of the tower, shape of each item, arguments of the
#: encoding call) -> the signal ``(N, C)`` of each item.
Pool = Callable[[Any, Tensor, Sequence[Shape], Mapping[str, Any]], list[Tensor]]


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
        architecture: the name of the in-tree class.
        module: where it is.
        shapes: of the items of each modality that it takes.
        tower: its vision tower.
        mrope: whether positions are those of time, height and width.
    """

    architecture: str
    module: str
    shapes: Mapping[str, ShapeOf]
    tower: Tower
    mrope: bool = False

    @property
    def name(self) -> str:
        """The architecture to ask vLLM for."""
        return PREFIX + self.architecture

    def signals(self, config: Any, *, sharded_pictures: bool = False) -> frozenset[str]:
        """Names of the signals that models of a configuration give.

        Args:
            config: the model's configuration.
            sharded_pictures: whether each worker encodes other pictures than the rest.
        """
        if sharded_pictures:
            return frozenset({"prompt_embeddings"})
        names = {"prompt_embeddings", "vision_features", "received_attention", "queries", "keys"}
        if getattr(config.vision_config, "model_type", "") in _WITH_CLASS_TOKEN:
            names |= {"class_attention", "shallow_class_attention"}
        return frozenset(names)

    def require(self, stage: ServedStage, config: Any, *, sharded_pictures: bool = False) -> None:
        """Check that models of a configuration can serve a stage.

        Args:
            stage: the stage.
            config: the model's configuration.
            sharded_pictures: see :meth:`signals`.

        Raises:
            ServingError: if they lack a signal, or take none of the stage's modalities.
        """
        if not set(stage.modalities) & set(self.shapes):
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
    return picture if len(picture) == processed.tokens else Shape.line(processed.tokens)


def merged_patches(modality: str) -> ShapeOf:
    """Patches merged two by two, with the grid among the fields (Qwen-VL)."""

    def shape_of(processed: Processed) -> Shape:
        merge = processed.info.get_hf_config().vision_config.spatial_merge_size
        frames, rows, columns = processed.fields[f"{modality}_grid_thw"].data.tolist()
        grid = (frames, rows // merge, columns // merge)
        fits = math.prod(grid) == processed.tokens
        return Shape.grid(*grid) if fits else Shape.line(processed.tokens)

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


def merged(
    model: Any, signal: Tensor, shapes: Sequence[Shape], arguments: Mapping[str, Any]
) -> list[Tensor]:
    """Patches merged two by two; they come in groups, by windows if the tower has any (Qwen-VL)."""
    tower = model.visual
    tokens = signal[0].unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
    if hasattr(tower, "get_window_index"):
        grids = arguments.get("image_grid_thw", arguments.get("video_grid_thw"))
        plan = tower.prepare_encoder_metadata(grids.tolist())
        tokens = tokens[plan["reverse_indices"]]
    return list(tokens.split([len(shape) for shape in shapes]))


_LLAVA_TOWER: Final = Tower(
    layers="vision_tower.vision_model.encoder.layers",
    projector="multi_modal_projector",
    deep=feature_layer,
    pool=patches,
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
)
#: By the name to ask vLLM for.
FAMILIES: Final[Mapping[str, Family]] = {family.name: family for family in _ALL}
