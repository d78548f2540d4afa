"""The releases of transformers that TokenReduce runs on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from packaging.version import Version
from torch import nn

from tokenreduce.errors import UnsupportedRelease

OLDEST: Final = "5.22"
"""Earlier ones merge visual features or number positions in other ways, except in ``EARLIER``."""
EARLIER: Final[Mapping[str, str]] = dict.fromkeys(
    (
        "InternVLForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    ),
    "5.19",
)
"""Classes of models and the oldest release that runs each: vLLM serves these, beside which no newer
transformers than its own can be installed."""
NEXT_MAJOR: Final = "6"


def oldest_release(model_class: str) -> str:
    """The oldest release that models of a class are attached to on."""
    return EARLIER.get(model_class, OLDEST)


def require_supported_release(model: nn.Module) -> None:
    """Refuse a transformers whose models are built otherwise, rather than reduce them wrongly.

    Args:
        model: what is to be attached to.

    Raises:
        UnsupportedRelease: naming the installed release.
    """
    import transformers

    installed = Version(transformers.__version__)
    name = type(model).__name__
    oldest = oldest_release(name)
    # The development version of a release counts as that release.
    if not Version(oldest) <= Version(installed.base_version) < Version(NEXT_MAJOR):
        raise UnsupportedRelease(
            f"transformers {installed} is installed; TokenReduce attaches to {name} of "
            f"transformers >={oldest},<{NEXT_MAJOR}. "
            f"pip install 'transformers>={oldest},<{NEXT_MAJOR}'"
        )
