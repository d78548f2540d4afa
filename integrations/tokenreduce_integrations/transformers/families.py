"""What differs between families of transformers models, as data and small functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenreduce.capabilities import Site
from tokenreduce.errors import UnsupportedModel
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers import layouts, vision
from tokenreduce_integrations.transformers.deepstack import shorten_deepstack
from tokenreduce_integrations.transformers.frames import FramesSite, PatchedClips, StackedClips
from tokenreduce_integrations.transformers.probes import ProbeFactory, TowerProbes, pools, towers
from tokenreduce_integrations.transformers.sequence import ReducedItem, SequencePlan

if TYPE_CHECKING:
    from tokenreduce_integrations.transformers.watch import EncoderSite

ArgumentShortener = Callable[
    [Mapping[str, Any], SequencePlan, Sequence[ReducedItem]], dict[str, Any]
]
#: (owner, stages at the site that act now) -> the site; asked for the stages at every encoding.
EncoderSiteFactory = Callable[[Any, Callable[[], tuple[Stage, ...]]], "EncoderSite"]
LayoutFunction = Callable[[Any, Sequence[Tensor], Mapping[str, Any]], list[Layout]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models.

    Attributes:
        name: how errors and the support matrix call it.
        layouts: for each modality, where the tokens of its items lie; called with the module that
            owns the features, the features ``(N, D)`` of each item, and the arguments of the
            encoding call. A modality without an entry has no known geometry: its tokens are laid
            out as a line.
        probe: what reads signals while the encoder runs; without one, strategies read projected
            features and the prompt only.
        shorten: what shortens the further per-token arguments that this family's decoder reads.
        joins_tiles: whether tiles that follow one another in the sequence, without text between
            them, are one visual item.
        llm_sites: sites at or in the LLM that can be served.
        encoder_sites: what runs stages before (``frames``) or inside (``vision``) the encoder.
    """

    name: str
    layouts: Mapping[str, LayoutFunction] = field(default_factory=dict)
    probe: ProbeFactory | None = None
    shorten: ArgumentShortener | None = None
    joins_tiles: bool = False
    llm_sites: tuple[Site, ...] = ("projector", "decoder")
    encoder_sites: Mapping[Site, EncoderSiteFactory] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites that can be served."""
        return (*self.encoder_sites, *self.llm_sites)


GENERIC = Family(name="generic")
LLAVA = Family(
    name="LLaVA",
    layouts={"image": layouts.square_patches},
    probe=TowerProbes(tower=towers.image_tower, pools={"image": pools.patches}),
    encoder_sites={"vision": vision.PatchTowerSite},
)
LLAVA_NEXT = Family(
    name="LLaVA-NeXT",
    layouts={"image": layouts.packed_tiles},
    probe=TowerProbes(tower=towers.image_tower, pools={"image": pools.packed_tiles}),
    encoder_sites={"vision": vision.TiledTowerSite},
)
LLAVA_ONEVISION = Family(
    name="LLaVA-OneVision",
    layouts={"image": layouts.packed_tiles, "video": layouts.pooled_frames},
    probe=TowerProbes(
        tower=towers.image_tower,
        pools={"image": pools.packed_tiles, "video": pools.pooled_frames},
    ),
    encoder_sites={
        "frames": partial(FramesSite, StackedClips(newlines=1)),
        "vision": vision.TiledTowerSite,
    },
)
LLAVA_NEXT_VIDEO = Family(
    name="LLaVA-NeXT-Video",
    layouts={"image": layouts.packed_tiles, "video": layouts.pooled_frames},
    encoder_sites={"frames": partial(FramesSite, StackedClips())},
)
_QWEN_LAYOUTS = {
    "image": layouts.merged_patches("image"),
    "video": layouts.merged_patches("video"),
}
_QWEN_PROBES = TowerProbes(
    tower=towers.native_tower,
    pools={"image": pools.merged_patches("image"), "video": pools.merged_patches("video")},
)
_QWEN_SITES: Mapping[Site, EncoderSiteFactory] = {
    "frames": partial(FramesSite, PatchedClips()),
    "vision": vision.PackedTowerSite,
}
QWEN2_VL = Family(
    name="Qwen2-VL", layouts=_QWEN_LAYOUTS, probe=_QWEN_PROBES, encoder_sites=_QWEN_SITES
)
QWEN2_5_VL = Family(
    name="Qwen2.5-VL", layouts=_QWEN_LAYOUTS, probe=_QWEN_PROBES, encoder_sites=_QWEN_SITES
)
QWEN3_VL = Family(
    name="Qwen3-VL",
    layouts=_QWEN_LAYOUTS,
    probe=_QWEN_PROBES,
    shorten=shorten_deepstack,
    encoder_sites=_QWEN_SITES,
)
INTERNVL = Family(
    name="InternVL",
    layouts={"image": layouts.square_tiles},
    joins_tiles=True,
    probe=TowerProbes(tower=towers.image_tower, pools={"image": pools.shuffled_patches}),
    encoder_sites={"vision": vision.ShuffledTowerSite},
)


def find_decoder(model: nn.Module) -> Any:
    """The text decoder: the module that runs the LLM's layers.

    Raises:
        UnsupportedModel: if there is none.
    """
    found: Any = model
    while True:
        inner = found.get_decoder() if hasattr(found, "get_decoder") else found
        if inner is found and not hasattr(found, "layers") and hasattr(found, "model"):
            inner = found.model
        if inner is found or inner is None:
            break
        found = inner
    if found is model or not isinstance(getattr(found, "layers", None), nn.ModuleList):
        raise UnsupportedModel(
            f"{type(model).__name__} has no text decoder behind an encoder: it is a text-only "
            "model, or one whose decoder TokenReduce does not know. Attach to a multimodal model "
            "such as LlavaForConditionalGeneration."
        )
    return found


def find_owner(model: nn.Module) -> Any:
    """The module that merges visual features into the text embeddings.

    Raises:
        UnsupportedModel: if the model does not place visual tokens in its sequence.
    """
    for candidate in (getattr(model, "model", None), getattr(model, "base_model", None), model):
        if isinstance(candidate, nn.Module) and hasattr(candidate, "get_placeholder_mask"):
            return candidate
    raise UnsupportedModel(
        f"{type(model).__name__} does not place visual tokens in the LLM's sequence by way of "
        "get_placeholder_mask: it is a text-only model, or one whose visual tokens reach the LLM "
        "in a way that no installed adapter knows."
    )
