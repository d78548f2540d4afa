"""transformers models."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_model_adapters(register: Register) -> None:
    """Register the adapters of transformers models: one for each family, and the generic one."""
    here = "tokenreduce_integrations.transformers"
    models = "transformers.models"
    for name, adapter, base, summary in (
        (
            "transformers",
            "TransformersAdapter",
            "transformers.modeling_utils.PreTrainedModel",
            "multimodal LLMs of transformers; tokens without known geometry",
        ),
        (
            "llava",
            "LlavaAdapter",
            f"{models}.llava.modeling_llava.LlavaPreTrainedModel",
            "LLaVA-1.5 and models of its class",
        ),
        (
            "llava-onevision",
            "LlavaOnevisionAdapter",
            f"{models}.llava_onevision.modeling_llava_onevision.LlavaOnevisionPreTrainedModel",
            "LLaVA-OneVision, images and video",
        ),
        (
            "llava-next",
            "LlavaNextAdapter",
            f"{models}.llava_next.modeling_llava_next.LlavaNextPreTrainedModel",
            "LLaVA-NeXT, tiled images",
        ),
        (
            "llava-next-video",
            "LlavaNextVideoAdapter",
            f"{models}.llava_next_video.modeling_llava_next_video.LlavaNextVideoPreTrainedModel",
            "LLaVA-NeXT-Video, tiled images and video",
        ),
        (
            "qwen2-vl",
            "Qwen2VLAdapter",
            f"{models}.qwen2_vl.modeling_qwen2_vl.Qwen2VLPreTrainedModel",
            "Qwen2-VL, images and video",
        ),
        (
            "qwen3-vl",
            "Qwen3VLAdapter",
            f"{models}.qwen3_vl.modeling_qwen3_vl.Qwen3VLPreTrainedModel",
            "Qwen3-VL with DeepStack, images and video",
        ),
        (
            "internvl",
            "InternVLAdapter",
            f"{models}.internvl.modeling_internvl.InternVLPreTrainedModel",
            "InternVL, tiles",
        ),
        (
            "qwen2.5-vl",
            "Qwen2_5VLAdapter",
            f"{models}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLPreTrainedModel",
            "Qwen2.5-VL, images and video",
        ),
    ):
        register(
            name,
            f"{here}.adapters:{adapter}",
            models=(base,),
            loader=f"{here}.loading:load_model",
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
        models=tuple(f"{models}.{name}" for name in alone),
        summary="CLIP, SigLIP, DINOv2 and InternViT encoders alone",
    )
