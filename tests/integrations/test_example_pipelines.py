"""The example pipelines, on tiny models of the same classes."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support import tiny_models
from support.tiny_models import BOS, IMAGE, TEXT, Case, lively, noise, words
from tokenreduce_integrations.accounting.flops import count_flops
from tokenreduce_integrations.accounting.weights import weigh
from tokenreduce_integrations.testbed.models import model_path

EXAMPLES = Path(__file__).parents[2] / "examples/pipelines"


def wider(case: Case) -> Case:
    """With an MLP that 4-bit kernels of CPUs can pack."""
    config = copy.deepcopy(case.model.config)
    config.text_config.intermediate_size = 128
    return Case(lively(type(case.model)(config)), case.inputs, case.items)


def instructblip() -> Case:
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.InstructBlipConfig(
        vision_config={**shared, "num_hidden_layers": 3, "image_size": 56, "patch_size": 14},
        qformer_config={
            **shared,
            "num_hidden_layers": 2,
            "vocab_size": 200,
            "encoder_hidden_size": 32,
        },
        text_config={"model_type": "llama", **TEXT},
        num_query_tokens=32,
        image_token_index=IMAGE,
    )
    inputs = {
        "input_ids": torch.tensor([[BOS, *[IMAGE] * 32, *words(5, 1)]]),
        "pixel_values": noise(1, 3, 56, 56),
        "qformer_input_ids": torch.tensor([words(4, 2)]),
    }
    return Case(lively(transformers.InstructBlipForConditionalGeneration(config)), inputs, ())


TINY: dict[str, tuple[Callable[[], Case], str]] = {
    "lftr_16x": (tiny_models.llava, ""),
    "divprune_qwen25": (tiny_models.qwen2_5_vl, ""),
    "per_frame_video": (tiny_models.qwen2_5_vl, ""),
    "llava_int8_pruned": (tiny_models.llava, "torchao"),
    "qwen25_nf4_pruned": (lambda: wider(tiny_models.qwen2_5_vl()), "bitsandbytes"),
    "internvl3_int8_pruned": (tiny_models.internvl, "torchao"),
    "instructblip_int8_pruned": (instructblip, "torchao"),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """bitsandbytes logs every cast."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {*TINY, "testbed"}


@pytest.mark.parametrize("name", TINY)
def test_examples_build_run_and_come_back(name: str, tmp_path: Path) -> None:
    make, package = TINY[name]
    if package:
        pytest.importorskip(package, reason="needs the extra quant")
    case = make()
    folder = tmp_path / "model"
    weights = shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    shutil.copytree(model_path("b"), folder, ignore=weights)
    case.model.save_pretrained(folder)
    changes = [f"model.path={folder}", "model.dtype=float32", "model.device=cpu"]
    if name == "qwen25_nf4_pruned":
        changes.append("model.quantization.compute_dtype=float32")
    pipeline = tr.load_pipeline(EXAMPLES / f"{name}.yaml", changes)
    built = pipeline.build()

    def answer(model: Any) -> Tensor:
        found: Tensor = model.generate(**case.batch(), max_new_tokens=4, do_sample=False)
        return found

    expected = answer(built.model)
    assert built.attachment.receipt.tokens_out < built.attachment.receipt.tokens_in
    assert count_flops(built.model, lambda: answer(built.model)).parts["encoder"] > 0
    settings = pipeline.model
    if settings is not None and settings.quantization is not None:
        assert weigh(built.model).total_bytes < weigh(case.model).total_bytes
    built.save_pretrained(tmp_path / "saved")
    again = tr.BuiltPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(answer(again.model), expected)
