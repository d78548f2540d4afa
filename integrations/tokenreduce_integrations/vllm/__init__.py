"""Served by vLLM: its own model classes, whose images and clips are reduced before the LLM.

Each family of :mod:`.families` has a class ``TokenReduce<Architecture>``. It is opted into with
``hf_overrides={"architectures": ["TokenReduce..."], "tokenreduce": {"strategy": ..., ...}}``.
"""

from tokenreduce.errors import UnsupportedRelease
from tokenreduce_integrations.vllm.families import FAMILIES
from tokenreduce_integrations.vllm.release import require_supported_release


def register() -> None:
    """Make the classes known to vLLM: an entry point that runs in each of its processes.

    In a release that they are not made for, asking for one of them raises; vLLM itself goes on.
    """
    from vllm import ModelRegistry

    try:
        require_supported_release()
    except UnsupportedRelease:
        for name in FAMILIES:
            ModelRegistry.register_model(name, f"tokenreduce_integrations.vllm.unsupported:{name}")
        return
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from tokenreduce_integrations.vllm.config import ReducingConfig

    for name in FAMILIES:
        ModelRegistry.register_model(name, f"tokenreduce_integrations.vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = ReducingConfig
