"""Served by vLLM: its own model classes, whose images and clips are reduced before the LLM.

Each family of :mod:`.families` has a class ``TokenReduce<Architecture>``. It is opted into with
``hf_overrides={"architectures": ["TokenReduce..."], "tokenreduce": {"strategy": ..., ...}}``.
"""

from tokenreduce_integrations.vllm.families import FAMILIES


def register() -> None:
    """Make the classes known to vLLM: an entry point that runs in each of its processes."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from tokenreduce_integrations.vllm.config import ReducingConfig

    for name in FAMILIES:
        ModelRegistry.register_model(name, f"tokenreduce_integrations.vllm.model:{name}")
        MODELS_CONFIG_MAP[name] = ReducingConfig
