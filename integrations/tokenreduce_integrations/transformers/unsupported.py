"""Multimodal models that cannot be served, and why."""

from __future__ import annotations

_ACROSS = "its text decoder attends across to the vision encoder, with no tokens in a sequence"
_THINKER = "it is several models: attach to its thinker, as in attach(model.thinker, ...)"

REASONS = {
    "blip.modeling_blip.BlipPreTrainedModel": _ACROSS,
    "evolla.modeling_evolla.EvollaPreTrainedModel": "it reads proteins, not images",
    "git.modeling_git.GitPreTrainedModel": (
        "it puts image tokens before the text within the pass that runs its layers, with masks of "
        "its own"
    ),
    "idefics.modeling_idefics.IdeficsPreTrainedModel": (
        "its layers attend across to images through masks of their own; Llama 3.2 Vision and "
        "Idefics 2 and 3 are served"
    ),
    "kosmos2.modeling_kosmos2.Kosmos2PreTrainedModel": (
        "its text model places image tokens within the pass that runs its layers, at positions "
        "counted from the token ids"
    ),
    "kosmos2_5.modeling_kosmos2_5.Kosmos2_5PreTrainedModel": (
        "its text model places image tokens within the pass that runs its layers, at positions "
        "counted from the token ids"
    ),
    "pi0.modeling_pi0.PI0PreTrainedModel": "it is a robot's policy and generates no text",
    "pix2struct.modeling_pix2struct.Pix2StructPreTrainedModel": _ACROSS,
    "pp_formulanet.modeling_pp_formulanet.PPFormulaNetPreTrainedModel": _ACROSS,
    "qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniForConditionalGeneration": _THINKER,
    "qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeForConditionalGeneration": _THINKER,
    "t5gemma2.modeling_t5gemma2.T5Gemma2PreTrainedModel": (
        "its text encoder encodes images itself, and its decoder attends to itself and to the "
        "encoder in one, by masks built for the whole prompt"
    ),
    "udop.modeling_udop.UdopPreTrainedModel": (
        "it merges image patches into the words that they lie under, by their boxes"
    ),
    "vision_encoder_decoder.modeling_vision_encoder_decoder.VisionEncoderDecoderModel": _ACROSS,
}
"""Why each class and its kin cannot be served, by qualified name within transformers.models."""


def reason_for(kind: type) -> str:
    """Why a class of models cannot be served."""
    for ancestor in kind.__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}".removeprefix("transformers.models.")
        if name in REASONS:
            return REASONS[name]
    return "no reason is recorded"
