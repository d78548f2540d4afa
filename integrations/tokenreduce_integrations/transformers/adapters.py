"""Model adapters: which family a model belongs to, and putting stages on it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from tokenreduce.attachment import Attachment
from tokenreduce.errors import (
    BudgetError,
    MissingSignal,
    PipelineError,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce.plugins import installed
from tokenreduce.stage import Stage
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.attachment import TransformersAttachment
from tokenreduce_integrations.transformers.cross_attention import CrossAttentionAttachment
from tokenreduce_integrations.transformers.depth import at_depth, check_depth
from tokenreduce_integrations.transformers.diffusion import DiffusionAttachment
from tokenreduce_integrations.transformers.embedding import ChameleonAttachment, Phi4Attachment
from tokenreduce_integrations.transformers.encoder_decoder import EncoderAttachment, find_encoder
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.inlined import (
    InlinedEncoderGeneration,
    InlinedGeneration,
)
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.release import require_supported_release
from tokenreduce_integrations.transformers.rows import DECODER_SIGNALS
from tokenreduce_integrations.transformers.unsupported import reason_for

_JOINT = frozenset({"joint_image_embeddings", "joint_text_embeddings"})
_ENCODER = "joint_encoder='openai/clip-vit-large-patch14-336'"
_PROCESSOR = "processor=processor"
#: What is read above the encoder, of tokens that the LLM sees.
_ABOVE = frozenset({"vision_features", "prompt_embeddings"}) | _JOINT


class TransformersAdapter:
    """Any transformers model that merges visual features through ``get_placeholder_mask``.

    Tokens are laid out on the grid that the model is given beside the pixels, else as a line;
    adapters of families know more.
    """

    family: ClassVar[Family] = families.GENERIC
    denoises: ClassVar[bool] = False
    """Whether its models generate by denoising, so that steps can be told apart."""

    def attach(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> Attachment:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        self.check(model, stages, processor, joint_encoder)
        parts = self.parts(model)
        stages = tuple(at_depth(parts["decoder"], stage) for stage in stages)
        parameter = next(parts["decoder"].parameters())
        if any(stage.limit is not None for stage in stages):
            from tokenreduce_integrations.accounting.prices import priced

            stages = priced(model, stages)
        for stage in stages:
            stage.reducer.prepare(parameter.device, parameter.dtype)
        joint = None
        if any(_JOINT.intersection(stage.reducer.needs) for stage in stages):
            joint = JointEncoder.load(joint_encoder, next(parts["owner"].parameters()).device)
        return self.attachment(model)(
            model,
            stages,
            family=self.family,
            tokenizer=getattr(processor, "tokenizer", processor),
            joint=joint,
            **parts,
        )

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        """The kind of attachment that serves a model."""
        return TransformersAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        """The modules of a model that the attachment works on.

        Raises:
            UnsupportedModel: if they are not there.
        """
        return {
            "decoder": families.find_decoder(model),
            "owner": families.find_owner(model, self.family),
        }

    def check(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> None:
        """See :class:`tokenreduce.attachment.ModelAdapter`."""
        require_supported_release(model)
        parts = self.parts(model)
        owner = parts["owner"]
        inside = tuple(stage for stage in stages if stage.site == "vision")
        for stage in stages:
            self._check(model, owner, stage, processor, joint_encoder)
            if inside and stage.site == "projector":
                self._check_above(stage, self._offers(owner, stage, processor, joint_encoder))
        if inside:
            self.family.encoder_sites["vision"](owner, lambda: inside).detach()

    def _check_above(self, stage: Stage, offered: frozenset[str]) -> None:
        """Check that a stage reads nothing of the sequence that one inside the encoder shortens."""
        hidden = [n for n in stage.reducer.needs if n in offered and n not in _ABOVE]
        if hidden:
            raise MissingSignal(
                f"strategy {stage.reducer.name!r} needs {', '.join(map(repr, hidden))} of the "
                "encoder, whose sequence a stage at the site 'vision' shortens: it would not fit "
                "the tokens that the LLM sees. Use one of the two."
            )

    def _offers(
        self, owner: Any, stage: Stage, processor: Any | None, joint_encoder: Any | None
    ) -> frozenset[str]:
        """Names of the signals that a stage may read."""
        if stage.site == "decoder":
            return DECODER_SIGNALS
        offered = frozenset[str]() if self.family.probe is None else self.family.probe.offers(owner)
        if stage.site != "projector":
            return offered
        offered |= {"prompt_embeddings"}
        if self._joint_tower(owner) is None or joint_encoder is None:
            return offered
        return offered | (_JOINT if processor is not None else {"joint_image_embeddings"})

    def _joint_tower(self, owner: Any) -> Any | None:
        probe = self.family.probe
        return None if probe is None else probe.joint_tower(owner)

    def _check(
        self,
        model: nn.Module,
        owner: Any,
        stage: Stage,
        processor: Any | None,
        joint_encoder: Any | None,
    ) -> None:
        if stage.reducer.from_step and not self.denoises:
            inner = " and ".join(repr(each.name) for each in stage.reducer.inner_reducers())
            raise UnsupportedModel(
                f"strategy {stage.reducer.name!r}: {type(model).__name__} is not a diffusion "
                f"model, and has no denoising step from which on it could reduce. Use {inner} "
                "alone."
            )
        if stage.site not in self.family.sites:
            raise UnsupportedSite(
                f"stage {stage.reducer.name!r} at the site {stage.site!r}: "
                f"{type(model).__name__} ({self.family.name} family) is served at: "
                f"{', '.join(self.family.sites)}.{_why_no_frames(owner, stage)}"
            )
        if stage.site == "vision":
            return  # the site itself knows what blocks of the encoder give
        if stage.site == "decoder":
            decoder = self.parts(model)["decoder"]
            check_depth(decoder, at_depth(decoder, stage).layers)
        offered = self._offers(owner, stage, processor, joint_encoder)
        missing = [name for name in stage.reducer.needs if name not in offered]
        tower = self._joint_tower(owner)
        if missing:
            advice = ""
            if stage.site == "projector" and tower is not None and _JOINT.issuperset(missing):
                given = {_ENCODER: joint_encoder, _PROCESSOR: processor}
                absent = [argument for argument, value in given.items() if value is None]
                advice = (
                    f"Pass {' and '.join(absent)} to attach, with the vision-text encoder that the "
                    "model took its tower from (in YAML: model.joint_encoder). "
                )
            would_work = [
                name
                for name, record in installed().strategies.items()
                if stage.site in record.sites and offered.issuperset(record.needs)
            ]
            raise MissingSignal(
                f"strategy {stage.reducer.name!r} needs {', '.join(map(repr, missing))}, which "
                f"cannot be captured from {type(model).__name__} ({self.family.name} family; it "
                f"gives {', '.join(sorted(offered)) or 'projected features only'}). {advice}"
                f"What would work: {', '.join(would_work)}."
            )
        if _JOINT.intersection(stage.reducer.needs):
            JointEncoder.require_same_tower(tower, JointEncoder.config_of(joint_encoder))


def _why_no_frames(owner: Any, stage: Stage) -> str:
    if stage.site != "frames" or hasattr(owner, "get_video_features"):
        return ""
    return (
        " It encodes the frames of a clip as so many images, and nothing says which of them make a "
        "clip: choose frames before the processor."
    )


class LlavaAdapter(TransformersAdapter):
    """LLaVA-1.5 and models of its class."""

    family = families.LLAVA


class LlavaOnevisionAdapter(TransformersAdapter):
    """LLaVA-OneVision: tiled images and clips."""

    family = families.LLAVA_ONEVISION


class LlavaNextVideoAdapter(TransformersAdapter):
    """LLaVA-NeXT-Video: tiled images and clips."""

    family = families.LLAVA_NEXT_VIDEO


class LlavaNextAdapter(TransformersAdapter):
    """LLaVA-NeXT: tiled images."""

    family = families.LLAVA_NEXT


class Qwen2VLAdapter(TransformersAdapter):
    """Qwen2-VL: native-resolution images and clips."""

    family = families.QWEN2_VL


class Qwen3VLAdapter(TransformersAdapter):
    """Qwen3-VL: native-resolution images and clips, with DeepStack."""

    family = families.QWEN3_VL


class InternVLAdapter(TransformersAdapter):
    """InternVL: pixel-shuffled tiles; those of one image are one item."""

    family = families.INTERNVL


class Qwen2_5VLAdapter(TransformersAdapter):  # noqa: N801 (the model's own name)
    """Qwen2.5-VL: native-resolution images and clips."""

    family = families.QWEN2_5_VL


class SquareTilesAdapter(TransformersAdapter):
    """Models whose images become square grids of tokens, each an item of its own."""

    family = families.SQUARES


class PixtralAdapter(TransformersAdapter):
    """Models with a Pixtral encoder: images of their own size."""

    family = families.PIXTRAL


class GraniteDoclingAdapter(TransformersAdapter):
    """Granite-Docling: DeepStack."""

    family = families.GRANITE_DOCLING


class Gemma3Adapter(TransformersAdapter):
    """Gemma 3: image tokens that see one another both ways."""

    family = families.GEMMA3


class Gemma3nAdapter(TransformersAdapter):
    """Gemma 3n: inputs for each layer."""

    family = families.GEMMA3N


class Gemma4Adapter(TransformersAdapter):
    """Gemma 4: inputs for each layer, and image tokens that may see one another both ways."""

    family = families.GEMMA4


class Gemma4UnifiedAdapter(TransformersAdapter):
    """Gemma 4 unified: image tokens that see one another both ways."""

    family = families.GEMMA4_UNIFIED


class DiffusionGemmaAdapter(TransformersAdapter):
    """DiffusionGemma: an encoder of prompts, and a decoder that denoises the answer."""

    family = families.DIFFUSION_GEMMA
    denoises = True

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return DiffusionAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        inner: Any = getattr(model, "model", model)
        if not hasattr(inner, "encoder"):
            raise UnsupportedModel(
                f"{type(model).__name__} is a part of a model: attach to the whole of it, a "
                "DiffusionGemmaForBlockDiffusion or DiffusionGemmaModel."
            )
        encoder = inner.encoder
        return {"decoder": encoder.language_model, "owner": encoder, "canvas": inner.decoder}

    def check(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> None:
        if len({stage.reducer.from_step for stage in stages}) > 1:
            raise PipelineError(
                "stages that reduce from different denoising steps on: give all of them one "
                "from_step, or wrap a chain of strategies in one denoising-schedule."
            )
        limited = [stage for stage in stages if stage.limit is not None]
        if limited:
            raise BudgetError(
                f"{limited[0].limit}: {type(model).__name__} reads the tokens again at each "
                "denoising step, and how many it will take is not known beforehand. Say how many "
                "tokens to keep."
            )
        super().check(model, stages, processor, joint_encoder)


class PaliGemmaAdapter(TransformersAdapter):
    """PaliGemma: a prefix that sees itself both ways."""

    family = families.PALIGEMMA


class Molmo2Adapter(TransformersAdapter):
    """Molmo 2: image tokens that see one another both ways."""

    family = families.MOLMO2


class IdeficsAdapter(TransformersAdapter):
    """Idefics 2 and 3: features placed by a merger; the images of a prompt are one item."""

    family = families.IDEFICS


class FuyuAdapter(TransformersAdapter):
    """Fuyu: projected patches without an encoder."""

    family = families.FUYU


class Llama4Adapter(TransformersAdapter):
    """Llama 4: tiles, each an item of its own."""

    family = families.LLAMA4


class Granite4VisionAdapter(TransformersAdapter):
    """Granite 4 Vision: visual features enter layer by layer."""

    family = families.GRANITE4_VISION


class InklingAdapter(TransformersAdapter):
    """Inkling: each run of image tokens is an item."""

    family = families.INKLING


class EncoderDecoderAdapter(TransformersAdapter):
    """Models whose visual tokens go into the encoder of an encoder-decoder (Florence-2)."""

    family = families.FLORENCE2

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return EncoderAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        encoder, text_decoder = find_encoder(model)
        owner = families.find_owner(model, self.family)
        return {"decoder": encoder, "text_decoder": text_decoder, "owner": owner}


class InstructBlipAdapter(EncoderDecoderAdapter):
    """Q-Formers before a decoder (Vicuna, OPT) or an encoder-decoder (T5)."""

    family = families.BLIP

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return EncoderAttachment if _encodes_text(model) else TransformersAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        return (
            super().parts(model) if _encodes_text(model) else TransformersAdapter.parts(self, model)
        )


class Blip2Adapter(InstructBlipAdapter):
    """BLIP-2: the same, with a generation of its own."""

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return InlinedEncoderGeneration if _encodes_text(model) else InlinedGeneration


class MllamaAdapter(TransformersAdapter):
    """Llama 3.2 Vision: visual tokens that layers attend across to."""

    family = families.MLLAMA

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return CrossAttentionAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        return {"decoder": families.find_decoder(model), "owner": getattr(model, "model", model)}


class Phi4MultimodalAdapter(TransformersAdapter):
    """Phi-4-multimodal: images embedded by the decoder itself."""

    family = families.PHI4_MULTIMODAL

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return Phi4Attachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        decoder: Any = getattr(model, "model", model)
        return {"decoder": decoder, "owner": decoder.embed_tokens_extend}


class ChameleonAdapter(TransformersAdapter):
    """Chameleon: images as codes, embedded by the decoder itself."""

    family = families.CHAMELEON

    def attachment(self, model: nn.Module) -> type[TransformersAttachment]:
        return ChameleonAttachment

    def parts(self, model: nn.Module) -> dict[str, Any]:
        decoder = getattr(model, "model", model)
        return {"decoder": decoder, "owner": decoder}


class UnsupportedAdapter(TransformersAdapter):
    """Multimodal models that cannot be served: says why."""

    def parts(self, model: nn.Module) -> dict[str, Any]:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be served: {reason_for(type(model))}."
        )


def _encodes_text(model: Any) -> bool:
    return bool(model.language_model.config.is_encoder_decoder)
