"""timm models."""

from tokenreduce.hookspecs import Register, hookimpl


@hookimpl
def register_model_adapters(register: Register) -> None:
    """Register the adapter of timm's vision transformers, alone or wrapped by transformers."""
    register(
        "timm",
        "tokenreduce_integrations.timm.adapter:TimmAdapter",
        models=(
            "timm.models.vision_transformer.VisionTransformer",
            "timm.models.eva.Eva",
            "timm.models.naflexvit.NaFlexVit",
            "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperPreTrainedModel",
        ),
        summary="vision transformers of timm: ViT, EVA and other rotary ones, NaFlex",
    )
