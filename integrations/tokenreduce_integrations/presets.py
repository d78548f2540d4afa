"""Pipelines that go by a name. Any value can be overridden, ``model.path`` above all."""

from typing import Any

from tokenreduce.hookspecs import Register, hookimpl

_INT8 = {"backend": "torchao", "scheme": "int8_weight_only", "modules": "language_model"}


def _llava(reduction: int, **model: Any) -> dict[str, Any]:
    return {
        "model": {"path": "llava-hf/llava-1.5-7b-hf", "dtype": "bfloat16", **model},
        "reduce": [{"strategy": "lftr", "site": "projector", "reduction": reduction}],
    }


LFTR_8X = _llava(8)
LFTR_16X = _llava(16)
LFTR_8X_INT8 = _llava(8, quantization=_INT8)
LFTR_16X_INT8 = _llava(16, quantization=_INT8)
LFTR_8X_INT8_PRUNED = _llava(
    8,
    quantization=_INT8,
    vision_encoder={"prune": {"backend": "structured", "mlp_ratio": 0.3}},
)


@hookimpl
def register_presets(register: Register) -> None:
    """Register the built-in presets."""
    for name, target, summary in (
        ("lftr-8x", "LFTR_8X", "LLaVA-1.5-7B with an eighth of its visual tokens"),
        ("lftr-16x", "LFTR_16X", "LLaVA-1.5-7B with a sixteenth of its visual tokens"),
        ("lftr-8x-int8", "LFTR_8X_INT8", "the same as lftr-8x with an int8 LLM"),
        ("lftr-16x-int8", "LFTR_16X_INT8", "the same as lftr-16x with an int8 LLM"),
        (
            "lftr-8x-int8-pruned",
            "LFTR_8X_INT8_PRUNED",
            "the same as lftr-8x-int8 with 30 % of the encoder's MLP channels removed",
        ),
    ):
        register(name, f"{__name__}:{target}", summary=summary)
