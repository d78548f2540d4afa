"""Stands in for the model classes in a release of vLLM that they are not made for.

vLLM asks for a class when a model is to be served with reduction, and not before: other models are
served as if TokenReduce were not there.
"""

from __future__ import annotations

from tokenreduce_integrations.vllm.families import FAMILIES
from tokenreduce_integrations.vllm.release import require_supported_release


def __getattr__(name: str) -> type:
    """No class: the reason why there is none.

    Raises:
        UnsupportedRelease: naming the installed release.
    """
    if name in FAMILIES:
        require_supported_release()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
