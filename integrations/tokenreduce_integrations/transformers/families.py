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
from tokenreduce_integrations.transformers.deepstack import (
    layerwise_features,
    shorten_deepstack,
    shorten_layerwise,
)
from tokenreduce_integrations.transformers.frames import FramesSite, PatchedClips, StackedClips
from tokenreduce_integrations.transformers.masks import (
    MaskBuilder,
    blocks_then_window,
    left_to_decoder,
    window_then_blocks,
)
from tokenreduce_integrations.transformers.per_token import gather_arguments
from tokenreduce_integrations.transformers.placement import (
    MERGER,
    MODALITIES,
    PLACEHOLDERS,
    Placement,
)
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


def embedded(kwargs: Mapping[str, Any], rows: Tensor, columns: Tensor) -> Tensor:
    """The visual embeddings themselves."""
    embeds: Tensor = kwargs["inputs_embeds"]
    return embeds[rows, columns]


def pooled_features(output: Any) -> Any:
    """What most families' encoding calls return."""
    return getattr(output, "pooler_output", None)


def first_layer_features(output: Any) -> Any:
    """For models without other features than those that enter layer by layer (Granite 4 Vision)."""
    layers = getattr(output, "deepstack_features", None)
    return None if layers is None else layers[0][1]


def last_features(output: Any) -> Any:
    """For models that place their tower's hidden states as they are (Fuyu)."""
    return getattr(output, "last_hidden_state", None)


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
        mask: what rebuilds the masks that this family builds before its decoder.
        counts_positions: whether the decoder, given no positions, counts them by the mask (OPT).
        placement: how the model says where features stand.
        seen: what strategies see of the tokens at the given rows and columns of the sequence;
            called with the decoder's arguments.
        features: the features of each item in what an encoding call returned; None if there are
            none.
        joins_tiles: whether tiles that follow one another in the sequence, without text between
            them, are one visual item.
        llm_sites: sites at or in the LLM that can be served.
        encoder_sites: what runs stages before (``frames``) or inside (``vision``) the encoder.
    """

    name: str
    layouts: Mapping[str, LayoutFunction] = field(default_factory=dict)
    probe: ProbeFactory | None = None
    shorten: ArgumentShortener | None = None
    mask: MaskBuilder | None = None
    counts_positions: bool = False
    placement: Placement = PLACEHOLDERS
    seen: Callable[[Mapping[str, Any], Tensor, Tensor], Tensor] = embedded
    features: Callable[[Any], Any] = pooled_features
    joins_tiles: bool = False
    llm_sites: tuple[Site, ...] = ("projector", "decoder")
    encoder_sites: Mapping[Site, EncoderSiteFactory] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites that can be served."""
        return (*self.encoder_sites, *self.llm_sites)


_GIVEN_GRIDS = {
    "image": layouts.given_grid("image"),
    "video": layouts.given_grid("video"),
}
GENERIC = Family(name="generic", layouts=_GIVEN_GRIDS)
SQUARES = Family(
    name="square images", layouts={"image": layouts.square_tiles, "video": layouts.square_tiles}
)
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
GRANITE_DOCLING = Family(name="Granite-Docling", shorten=shorten_deepstack)
GRANITE4_VISION = Family(
    name="Granite 4 Vision",
    shorten=shorten_layerwise,
    seen=layerwise_features,
    features=first_layer_features,
    llm_sites=("projector",),
)
INKLING = Family(name="Inkling", placement=Placement(runs=True), mask=left_to_decoder)
GEMMA3 = Family(name="Gemma 3", layouts={"image": layouts.square_tiles}, mask=blocks_then_window)
GEMMA3N = Family(
    name="Gemma 3n",
    layouts={"image": layouts.square_tiles},
    shorten=gather_arguments("per_layer_inputs"),
    # Its layers pass on several streams of hidden states.
    llm_sites=("projector",),
)
GEMMA4 = Family(
    name="Gemma 4", shorten=gather_arguments("per_layer_inputs"), mask=blocks_then_window
)
GEMMA4_UNIFIED = Family(name="Gemma 4 unified", mask=window_then_blocks)
DIFFUSION_GEMMA = Family(
    name="DiffusionGemma",
    # Its encoder gives the tokens of all images end to end.
    placement=Placement(runs=True),
    mask=window_then_blocks,
    # Masks of denoising steps hold for all layers, which are to be of one length.
    llm_sites=("projector",),
)
PALIGEMMA = Family(
    name="PaliGemma", layouts={"image": layouts.square_tiles}, mask=window_then_blocks
)
MOLMO2 = Family(name="Molmo 2", mask=window_then_blocks)
IDEFICS = Family(name="Idefics", placement=MERGER)
LLAMA4 = Family(name="Llama 4", layouts={"image": layouts.square_tiles}, features=last_features)
BLIP = Family(name="Q-Former", counts_positions=True)
PHI4_MULTIMODAL = Family(name="Phi-4-multimodal", llm_sites=("projector",))
CHAMELEON = Family(name="Chameleon", llm_sites=("projector",))
MLLAMA = Family(name="Llama 3.2 Vision", llm_sites=("projector",))
FLORENCE2 = Family(name="Florence-2", llm_sites=("projector",))
FUYU = Family(name="Fuyu", features=last_features)
PIXTRAL = Family(name="Pixtral", layouts={"image": layouts.sized_patches})
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
    if not hasattr(found.config, "num_hidden_layers"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no LLM that runs by itself: {type(found).__name__} reads "
            "what an encoder left in a cache. Its tokens are reduced, but its cost is not counted, "
            "and its weights are neither pruned nor quantized here."
        )
    return found


def find_owner(model: nn.Module, family: Family = GENERIC) -> Any:
    """The module that merges visual features into the text embeddings.

    Raises:
        UnsupportedModel: if the model does not place visual tokens in its sequence.
    """
    method = family.placement.method
    for candidate in (getattr(model, "model", None), getattr(model, "base_model", None), model):
        if isinstance(candidate, nn.Module) and hasattr(candidate, method):
            if not any(hasattr(candidate, f"get_{name}_features") for name in MODALITIES):
                raise UnsupportedModel(
                    f"{type(model).__name__} reads neither images nor video: there is nothing to "
                    "reduce."
                )
            return candidate
    raise UnsupportedModel(
        f"{type(model).__name__} does not place visual tokens in the LLM's sequence by way of "
        f"{method}: it is a text-only model, or one whose visual tokens reach the LLM "
        "in a way that no installed adapter knows."
    )
