"""Loading for pipelines, with the model that ships with the package."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support import needy
from tokenreduce.config import load_pipeline
from tokenreduce.errors import MissingExtra, MissingSignal, PipelineError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.pipeline import ModelSettings
from tokenreduce.plugins import installed
from tokenreduce_integrations.testbed.models import model_path
from tokenreduce_integrations.transformers.loading import load_model

CALLS: list[Any] = []


class DoublePrecision:
    """Quantizes upwards, which every machine can do."""

    def load_arguments(
        self, options: Mapping[str, Any], *, device: torch.device, model: nn.Module
    ) -> Mapping[str, Any]:
        assert next(model.parameters()).is_meta
        CALLS.append((dict(options), device))
        return {"dtype": torch.float64}


class Thinner:
    """Removes the last blocks of the vision encoder."""

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        assert next(model.parameters()).is_meta

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        assert processor.image_processor
        assert not model.training
        encoder = next(m for m in model.modules() if hasattr(m, "vision_tower")).vision_tower
        layers = next(
            child for child in encoder.modules() if isinstance(child, nn.ModuleList) and len(child)
        )
        del layers[options["blocks"] :]


@pytest.fixture(autouse=True)
def backends() -> Any:
    @hookimpl
    def register_quantizers(register: Any) -> None:
        register("double", f"{__name__}:DoublePrecision")
        register("absent", f"{__name__}_absent:X")

    @hookimpl
    def register_encoder_pruners(register: Any) -> None:
        register("thinner", f"{__name__}:Thinner")

    plugins = installed()
    hooks = SimpleNamespace(
        register_quantizers=register_quantizers, register_encoder_pruners=register_encoder_pruners
    )
    status = plugins.load("backends", hooks)
    assert status.state == "loaded", status.error
    yield
    plugins.statuses.remove(status)
    plugins.quantizers.remove("double")
    plugins.quantizers.remove("absent")
    plugins.encoder_pruners.remove("thinner")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in a folder, as save_pretrained writes it."""
    copied = tmp_path / "model"
    shutil.copytree(model_path("b"), copied)
    return copied


def settings(path: object = "testbed:b", **others: Any) -> ModelSettings:
    return ModelSettings(path=str(path), device="cpu", **others)


def test_the_shipped_model() -> None:
    model, processor = load_model(settings(dtype="float32"))
    assert next(model.parameters()).dtype == torch.float32
    assert not model.training
    assert processor.chat_template


def test_a_folder_in_the_type_of_its_weights(folder: Path) -> None:
    model, _ = load_model(settings(folder))
    assert next(model.parameters()).dtype == torch.bfloat16


def test_attention_is_passed_on() -> None:
    model, _ = load_model(settings(attention="eager"))
    assert model.config._attn_implementation == "eager"


def test_a_built_pipeline_runs() -> None:
    model, processor, run = load_pipeline(
        {
            "model": {"path": "testbed:b", "dtype": "float32", "device": "cpu"},
            "reduce": [{"strategy": "norm-topk", "reduction": 8}],
        }
    ).build()
    with run:
        pixels = torch.zeros(1, 3, 96, 96)
        text = processor.tokenizer("<image> " * 144 + "USER: what digit is shown ? ASSISTANT:")
        ids = torch.tensor([text["input_ids"]])
        model(input_ids=ids, pixel_values=pixels)
        assert run.receipt.tokens_out == 18


def test_a_quantizer_has_the_last_word() -> None:
    CALLS.clear()
    model, _ = load_model(settings(quantization={"backend": "double", "scheme": "wide"}))
    assert next(model.parameters()).dtype == torch.float64
    assert [({"scheme": "wide"}, torch.device("cpu"))] == CALLS


def test_a_pruner_runs_before_anything_is_attached() -> None:
    whole, _ = load_model(settings())
    thin, _ = load_model(settings(vision_encoder={"prune": {"backend": "thinner", "blocks": 1}}))
    assert sum(p.numel() for p in thin.parameters()) < sum(p.numel() for p in whole.parameters())


def test_pickled_weights_are_read_only_if_allowed(folder: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(PipelineError, match="'allow_pickle: true': reading them can run code"):
        load_model(settings(folder))
    model, _ = load_model(settings(folder, allow_pickle=True))
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./here", "no such folder"),
        ("a/b/c", "no such folder"),
        ("testbed:z", "no testbed model 'z'. Did you mean"),
        ("testbed:", "no testbed model ''"),
    ],
)
def test_paths_that_lead_nowhere(path: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        load_model(settings(path))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be loaded"):
        load_model(settings(tmp_path))


def test_a_folder_with_half_a_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(PipelineError, match="cannot be loaded"):
        load_model(settings(folder))


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(PipelineError, match="cannot be loaded"):
        load_model(settings(folder))


def test_a_text_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(PipelineError, match="cannot be loaded") as caught:
        load_model(settings(folder))
    assert len(str(caught.value)) < 800


def test_an_attention_that_cannot_be_used() -> None:
    with pytest.raises(PipelineError, match="Leave 'attention' out"):
        load_model(settings(attention="nonsense"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(PipelineError, match="Check that the device 'cuda:0' exists"):
        load_model(ModelSettings(path="testbed:b", device="cuda:0"))


def test_a_backend_that_cannot_be_imported_stops_before_loading() -> None:
    with pytest.raises(Exception, match="quantizer 'absent'") as caught:
        load_model(settings("/no/such", quantization={"backend": "absent"}))
    assert not isinstance(caught.value, MissingExtra)


def test_stages_are_checked_before_weights_are_read(tmp_path: Path) -> None:
    plugins = installed()
    assert plugins.load("needy", needy).state == "loaded"
    folder = tmp_path / "model"
    shutil.copytree(model_path("b"), folder)
    (folder / "model.safetensors").unlink()
    try:
        pipeline = load_pipeline(
            {"model": {"path": str(folder)}, "reduce": [{"strategy": "needs-joint", "keep": 4}]}
        )
        with pytest.raises(MissingSignal, match=r"joint_image_embeddings.*would work: .*lftr"):
            pipeline.build()
    finally:
        for name in needy.NAMES:
            plugins.strategies.remove(name)
