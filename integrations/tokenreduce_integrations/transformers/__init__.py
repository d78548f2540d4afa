"""transformers models."""

from tokenreduce.hookspecs import Register, hookimpl
from tokenreduce_integrations.transformers.unsupported import REASONS


def _bases(**folders: str) -> tuple[str, ...]:
    """Qualified names of classes, from model folders to class names."""
    return tuple(
        f"transformers.models.{folder}.modeling_{folder}.{name}" for folder, name in folders.items()
    )


_ADAPTERS = (
    (
        "transformers",
        "TransformersAdapter",
        ("transformers.modeling_utils.PreTrainedModel",),
        "multimodal LLMs of transformers; tokens on the given grid or without known geometry",
    ),
    (
        "llava",
        "LlavaAdapter",
        _bases(llava="LlavaPreTrainedModel"),
        "LLaVA-1.5 and models of its class",
    ),
    (
        "llava-onevision",
        "LlavaOnevisionAdapter",
        _bases(llava_onevision="LlavaOnevisionPreTrainedModel"),
        "LLaVA-OneVision, images and video",
    ),
    (
        "llava-next",
        "LlavaNextAdapter",
        _bases(llava_next="LlavaNextPreTrainedModel"),
        "LLaVA-NeXT, tiled images",
    ),
    (
        "llava-next-video",
        "LlavaNextVideoAdapter",
        _bases(llava_next_video="LlavaNextVideoPreTrainedModel"),
        "LLaVA-NeXT-Video, tiled images and video",
    ),
    (
        "qwen2-vl",
        "Qwen2VLAdapter",
        _bases(qwen2_vl="Qwen2VLPreTrainedModel"),
        "Qwen2-VL, images and video",
    ),
    (
        "qwen3-vl",
        "Qwen3VLAdapter",
        _bases(
            qwen3_vl="Qwen3VLPreTrainedModel",
            qwen3_vl_moe="Qwen3VLMoePreTrainedModel",
            qwen3_omni_moe="Qwen3OmniMoePreTrainedModel",
            cosmos3_omni="Cosmos3OmniPreTrainedModel",
            cohere_compass="CohereCompassPreTrainedModel",
        ),
        "Qwen3-VL and others with its DeepStack, images and video",
    ),
    (
        "internvl",
        "InternVLAdapter",
        _bases(internvl="InternVLPreTrainedModel", qianfan_ocr="QianfanOCRPreTrainedModel"),
        "InternVL, tiles",
    ),
    (
        "qwen2.5-vl",
        "Qwen2_5VLAdapter",
        _bases(qwen2_5_vl="Qwen2_5_VLPreTrainedModel"),
        "Qwen2.5-VL, images and video",
    ),
    (
        "square-tiles",
        "SquareTilesAdapter",
        _bases(
            aya_vision="AyaVisionPreTrainedModel",
            cohere2_vision="Cohere2VisionPreTrainedModel",
            deepseek_vl="DeepseekVLPreTrainedModel",
            deepseek_vl_hybrid="DeepseekVLHybridPreTrainedModel",
            fast_vlm="FastVlmPreTrainedModel",
            got_ocr2="GotOcr2PreTrainedModel",
            janus="JanusPreTrainedModel",
            ovis2="Ovis2PreTrainedModel",
            perception_lm="PerceptionLMPreTrainedModel",
            vipllava="VipLlavaPreTrainedModel",
        ),
        "models whose images become square grids of tokens",
    ),
    (
        "pixtral",
        "PixtralAdapter",
        _bases(
            lighton_ocr="LightOnOcrPreTrainedModel",
            mistral3="Mistral3PreTrainedModel",
            mistral_large4="MistralLarge4PreTrainedModel",
        ),
        "models with a Pixtral encoder, images of their own size",
    ),
    (
        "granite-docling",
        "GraniteDoclingAdapter",
        _bases(granite_docling="GraniteDoclingPreTrainedModel"),
        "Granite-Docling with DeepStack",
    ),
    (
        "gemma3",
        "Gemma3Adapter",
        _bases(gemma3="Gemma3PreTrainedModel"),
        "Gemma 3, whose image tokens see one another both ways",
    ),
    (
        "gemma3n",
        "Gemma3nAdapter",
        _bases(gemma3n="Gemma3nPreTrainedModel"),
        "Gemma 3n, with inputs for each layer",
    ),
    (
        "gemma4",
        "Gemma4Adapter",
        _bases(gemma4="Gemma4PreTrainedModel"),
        "Gemma 4, images and video",
    ),
    (
        "gemma4-unified",
        "Gemma4UnifiedAdapter",
        _bases(gemma4_unified="Gemma4UnifiedPreTrainedModel"),
        "Gemma 4 unified, images and video",
    ),
    (
        "diffusion-gemma",
        "DiffusionGemmaAdapter",
        _bases(diffusion_gemma="DiffusionGemmaPreTrainedModel"),
        "DiffusionGemma, which denoises blocks of its answer",
    ),
    (
        "paligemma",
        "PaliGemmaAdapter",
        _bases(paligemma="PaliGemmaPreTrainedModel"),
        "PaliGemma, whose prefix sees itself both ways",
    ),
    (
        "molmo2",
        "Molmo2Adapter",
        _bases(molmo2="Molmo2PreTrainedModel"),
        "Molmo 2, whose image tokens see one another both ways",
    ),
    (
        "idefics",
        "IdeficsAdapter",
        _bases(idefics2="Idefics2PreTrainedModel", idefics3="Idefics3PreTrainedModel"),
        "Idefics 2 and 3",
    ),
    ("llama4", "Llama4Adapter", _bases(llama4="Llama4PreTrainedModel"), "Llama 4, tiles"),
    (
        "granite4-vision",
        "Granite4VisionAdapter",
        _bases(granite4_vision="Granite4VisionPreTrainedModel"),
        "Granite 4 Vision, features that enter layer by layer",
    ),
    ("inkling", "InklingAdapter", _bases(inkling="InklingPreTrainedModel"), "Inkling"),
    (
        "instructblip",
        "InstructBlipAdapter",
        _bases(
            instructblip="InstructBlipPreTrainedModel",
            instructblipvideo="InstructBlipVideoPreTrainedModel",
        ),
        "InstructBLIP, a Q-Former before Vicuna (as in MiniGPT-4) or T5; images or clips",
    ),
    ("blip-2", "Blip2Adapter", _bases(blip_2="Blip2PreTrainedModel"), "BLIP-2 with OPT or T5"),
    (
        "florence2",
        "EncoderDecoderAdapter",
        _bases(florence2="Florence2PreTrainedModel"),
        "Florence-2, an encoder-decoder",
    ),
    (
        "mllama",
        "MllamaAdapter",
        _bases(mllama="MllamaPreTrainedModel"),
        "Llama 3.2 Vision, which attends across to visual tokens",
    ),
    (
        "phi4-multimodal",
        "Phi4MultimodalAdapter",
        _bases(phi4_multimodal="Phi4MultimodalPreTrainedModel"),
        "Phi-4-multimodal, whose decoder embeds images itself",
    ),
    (
        "chameleon",
        "ChameleonAdapter",
        _bases(chameleon="ChameleonPreTrainedModel"),
        "Chameleon, whose decoder embeds the codes of images",
    ),
    (
        "unsupported",
        "UnsupportedAdapter",
        tuple(f"transformers.models.{name}" for name in REASONS),
        "multimodal models that cannot be served; attaching says why",
    ),
    ("fuyu", "FuyuAdapter", _bases(fuyu="FuyuPreTrainedModel"), "Fuyu"),
)


@hookimpl
def register_model_adapters(register: Register) -> None:
    """Register the adapters of transformers models: one for each family, and the generic one."""
    here = "tokenreduce_integrations.transformers"
    for name, adapter, models, summary in _ADAPTERS:
        register(
            name,
            f"{here}.adapters:{adapter}",
            models=models,
            loader=f"{here}.loading:load_model",
            saver=f"{here}.saving:save_model",
            summary=summary,
        )
    alone = (
        "clip.modeling_clip.CLIPVisionModel",
        "clip.modeling_clip.CLIPVisionModelWithProjection",
        "siglip.modeling_siglip.SiglipVisionModel",
        "dinov2.modeling_dinov2.Dinov2Model",
        "dinov2.modeling_dinov2.Dinov2ForImageClassification",
        "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel",
        "internvl.modeling_internvl.InternVLVisionModel",
    )
    register(
        "vision-towers",
        f"{here}.towers:TowerAdapter",
        models=tuple(f"transformers.models.{name}" for name in alone),
        summary="CLIP, SigLIP, DINOv2 and InternViT encoders alone",
    )
