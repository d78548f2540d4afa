"""What TokenReduce sets up when vLLM configures an engine for one of its models."""

from __future__ import annotations

from typing import Any, Final

from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from tokenreduce.errors import ServingError
from tokenreduce_integrations.vllm.families import FAMILIES
from tokenreduce_integrations.vllm.settings import KEY, ServedStage

#: Makes the model runners ask a model where its visual tokens stand, and prunes nothing by itself:
#: ``1 - rate`` is 1 in every type.
_NO_PRUNING: Final = 1e-30


class ReducingConfig(VerifyAndUpdateConfig):  # type: ignore[misc]
    """Checks the settings of a server before a weight is read.

    Models with M-RoPE take the way that vLLM has for its own pruning of clips: its runners let the
    model correct positions once items are encoded. The runner of vLLM's CPU backend has that way
    and never enables it; a worker class of our own does, on its own runner.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """See vLLM; what the in-tree class asks for."""
        base = MODELS_CONFIG_MAP.get(FAMILIES[model_config.architecture].architecture)
        if base is not None:
            base.verify_and_update_model_config(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """See vLLM.

        Raises:
            ServingError: if the model, or the engine as configured, cannot serve the settings.
        """
        model_config = vllm_config.model_config
        family = FAMILIES[model_config.architecture]
        base = MODELS_CONFIG_MAP.get(family.architecture)
        if base is not None:
            base.verify_and_update_config(vllm_config)
        config, media = model_config.hf_config, model_config.multimodal_config
        family.require(
            ServedStage.from_config(getattr(config, KEY, None)),
            config,
            sharded_pictures=media.mm_encoder_tp_mode == "data",
        )
        if media.is_multimodal_pruning_enabled():
            raise ServingError(
                f"video_pruning_rate={media.video_pruning_rate}: vLLM would prune clips before "
                f"TokenReduce does. Leave it out, and say how many tokens stay in "
                f"hf_overrides[{KEY!r}]."
            )
        if vllm_config.compilation_config.compile_mm_encoder:
            raise ServingError(
                "compile_mm_encoder: signals of a compiled vision tower cannot be read, and a "
                "request may ask for a strategy that does. Leave it out."
            )
        if not family.mrope:
            return
        parallel = vllm_config.parallel_config
        for asked, what, why in (
            (
                vllm_config.speculative_config is not None,
                "speculative decoding",
                "vLLM hands the draft model positions from before they are corrected",
            ),
            (
                parallel.pipeline_parallel_size > 1,
                "pipeline parallelism",
                "vLLM corrects positions in the first stage alone",
            ),
        ):
            if asked:
                raise ServingError(
                    f"{family.architecture} is not served with {what}: its positions are those of "
                    f"time, height and width, and {why}."
                )
        media.video_pruning_rate = _NO_PRUNING
        if current_platform.is_cpu() and parallel.worker_cls == "auto":
            parallel.worker_cls = "tokenreduce_integrations.vllm.worker.CPUWorker"
