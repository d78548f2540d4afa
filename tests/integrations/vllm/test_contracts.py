"""What of vLLM the integration leans on, in the installed release or that in ``VLLM_SOURCE``.

No other code of ours says so: where a name or an argument changes, vLLM may well go on and pass
TokenReduce by. These tests read the source, so that a release that cannot run here can be checked:

    VLLM_SOURCE=unpacked/vllm python -m pytest -m vllm tests/integrations/vllm/test_contracts.py
"""

from __future__ import annotations

import os

import pytest

if "VLLM_SOURCE" not in os.environ:
    pytest.importorskip("vllm", reason="needs an environment with vLLM: nox -s vllm")

from support.vllm_source import Source
from tokenreduce_integrations.vllm.families import FAMILIES, Family

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SOURCE = Source.find()
PROCESSOR = "multimodal.processing.processor"
RUNNER = "v1.worker.gpu_model_runner"
PRUNING = "v1.worker.gpu.model_states.mm_pruning"

#: What is overridden or called, and what it takes.
SIGNATURES: dict[str, tuple[str, ...]] = {
    f"{PROCESSOR}:BaseMultiModalProcessor._get_mm_hashes": ("inputs",),
    f"{PROCESSOR}:BaseMultiModalProcessor._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    f"{PROCESSOR}:BaseMultiModalProcessor._get_mm_fields_config": (
        "hf_inputs",
        "hf_processor_mm_kwargs",
    ),
    f"{PROCESSOR}:BaseMultiModalProcessor._get_prompt_updates": (
        "mm_items",
        "hf_processor_mm_kwargs",
        "out_mm_kwargs",
    ),
    f"{PROCESSOR}:BaseMultiModalProcessor._get_mm_prompt_updates": (
        "mm_items",
        "hf_processor_mm_kwargs",
        "out_mm_kwargs",
    ),
    f"{PROCESSOR}:BaseMultiModalProcessor._get_cache_missing_processor_kwargs": (
        "inputs",
        "mm_is_cached",
    ),
    f"{PROCESSOR}:BaseMultiModalProcessor.get_dummy_inputs": (
        "seq_len",
        "mm_counts",
        "mm_options",
    ),
    "multimodal.registry:MultiModalRegistry.register_processor": (
        "processor",
        "info",
        "dummy_inputs",
    ),
    **{
        f"model_executor.models.{owner}._get_num_unpadded_features": (
            "original_height",
            "original_width",
            "npatches",
            "num_patch_height",
            "num_patch_width",
        )
        for owner in (
            "llava_next:LlavaNextProcessingInfo",
            "llava_onevision:LlavaOnevisionProcessingInfo",
        )
    },
    "model_executor.models.llava_next:LlavaNextForConditionalGeneration"
    "._merge_image_patch_embeddings": ("image_size", "patch_embeddings", "strategy"),
    "model_executor.models.llava_onevision:LlavaOnevisionForConditionalGeneration"
    "._merge_image_patch_embeddings": (
        "image_size",
        "patch_embeddings",
        "image_newline",
        "vision_aspect_ratio",
        "strategy",
    ),
    "model_executor.models.internvl:InternVLChatModel.pixel_shuffle": ("x", "scale_factor"),
    "model_executor.models.interfaces:SupportsMRoPE.get_mrope_input_positions": (
        "input_tokens",
        "mm_features",
    ),
    "model_executor.models.interfaces:SupportsMultiModalPruning.recompute_mrope_positions": (
        "input_ids",
        "multimodal_embeddings",
        "mrope_positions",
        "num_computed_tokens",
    ),
    "model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": ("vllm_config",),
    "model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_model_config": (
        "model_config",
    ),
    "config.multimodal:MultiModalConfig.is_multimodal_pruning_enabled": (),
    "utils.gpu_sync_debug:gpu_sync_allowed": ("first_only",),
}

#: Fields that are read or set.
FIELDS: dict[str, set[str]] = {
    f"{PROCESSOR}:PromptUpdateDetails": {"full", "is_embed"},
    f"{PROCESSOR}:ResolvedPromptUpdate": {"modality", "item_idx", "content"},
    "multimodal.processing.inputs:ProcessorInputs": {"hf_processor_mm_kwargs"},
    "multimodal.registry:_ProcessorFactories": {"info", "processor", "dummy_inputs"},
    "multimodal.inputs:MultiModalFeatureSpec": {"data", "modality", "identifier", "mm_position"},
    "multimodal.inputs:MultiModalFieldElem": {"data", "field"},
    "multimodal.inputs:MultiModalBatchedField": set(),
    "multimodal.inputs:PlaceholderRange": {"offset", "length"},
    "config.multimodal:MultiModalConfig": {"video_pruning_rate", "mm_encoder_tp_mode"},
    "config.compilation:CompilationConfig": {"compile_mm_encoder"},
    "config.parallel:ParallelConfig": {"worker_cls", "pipeline_parallel_size"},
    "v1.worker.encoder_cudagraph_defs:EncoderCudaGraphConfig": {"modalities"},
}

RECOMPUTED = {"input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens"}


def test_the_release_is_one_that_is_supported() -> None:
    assert SOURCE.version.split("+")[0].rsplit(".", 1)[0] in ("0.32", "0.33")


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_take_what_they_are_given(name: str) -> None:
    assert SOURCE.parameters(name) == SIGNATURES[name]


@pytest.mark.parametrize("name", FIELDS)
def test_data_has_the_fields_that_are_used(name: str) -> None:
    assert FIELDS[name] <= set(SOURCE.parameters(name))


@pytest.mark.parametrize("module", [RUNNER, PRUNING])
def test_both_runners_let_a_model_correct_its_positions(module: str) -> None:
    assert SOURCE.keywords(module, "recompute_mrope_positions") == [RECOMPUTED]
    assert "is_multimodal_pruning_enabled" in SOURCE.names(module)


@pytest.mark.parametrize("module", [RUNNER, "v1.worker.gpu.mm.encoder_runner"])
def test_both_runners_encode_by_the_method_that_reduces(module: str) -> None:
    assert SOURCE.keywords(module, "embed_multimodal")


def test_the_runner_for_cpus_enables_nothing_by_itself() -> None:
    assert "is_multimodal_pruning_enabled" not in SOURCE.names("v1.worker.cpu_model_runner")
    assert SOURCE.definition("v1.worker.cpu_worker:CPUWorker")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.architecture)
def test_the_classes_of_families_are_where_they_were(family: Family) -> None:
    module = family.module.removeprefix("vllm.")
    name = f"{module}:{family.class_name or family.architecture}"
    assert SOURCE.parameters(f"{name}.embed_multimodal") == ()
    if family.mrope:
        assert SOURCE.parameters(f"{name}.get_mrope_input_positions") == (
            "input_tokens",
            "mm_features",
        )


def test_requests_are_refused_settings_unless_the_server_trusts_them() -> None:
    path = "entrypoints.generate.base.protocol"
    assert {"trust_request_mm_kwargs", "mm_processor_kwargs"} <= SOURCE.names(path)
