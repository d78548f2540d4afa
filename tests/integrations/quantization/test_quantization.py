"""Quantizers: what they choose, what they refuse before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenreduce as tr
from support.tiny_models import CASES, internvl, llava, qwen3_vl
from tokenreduce.backends import find_quantizer
from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import ModelSettings
from tokenreduce_integrations.quantization.choices import modules_to_skip, quantized_linears
from tokenreduce_integrations.quantization.stored import refuse_device
from tokenreduce_integrations.testbed.models import model_path
from tokenreduce_integrations.transformers.loading import load_model

pytest.importorskip("torchao", reason="needs the extra quant")
pytest.importorskip("bitsandbytes", reason="needs the extra quant")

SCHEMES = [
    ("torchao", "int8_weight_only"),
    ("torchao", "int8_dynamic"),
    ("torchao", "intx_weight_only"),
    ("torchao", "float8_weight_only"),
    ("bitsandbytes", "int8"),
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "fp4"),
]


def settings(path: object = "testbed:b", **others: Any) -> ModelSettings:
    return ModelSettings(path=str(path), device="cpu", **{"dtype": "float32", **others})


def quantized(backend: str, scheme: str, **options: Any) -> dict[str, Any]:
    return {"quantization": {"backend": backend, "scheme": scheme, **options}}


def prompt(processor: Any) -> dict[str, Tensor]:
    text = "<image> " * 144 + "USER: what digit is shown ? ASSISTANT:"
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([processor.tokenizer(text)["input_ids"]]),
        "pixel_values": torch.randn(1, 3, 96, 96, generator=generator),
    }


def changed(model: Any) -> set[str]:
    """Paths of the linear layers whose weights are not plain any more."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    }


@pytest.fixture(scope="module")
def whole() -> Any:
    return load_model(settings())


@pytest.mark.parametrize(("backend", "scheme"), SCHEMES)
def test_quantized_models_say_nearly_the_same(backend: str, scheme: str, whole: Any) -> None:
    model, processor = load_model(settings(**quantized(backend, scheme)))
    inputs = prompt(processor)
    with torch.no_grad():
        expected, found = (m(**inputs).logits[:, -1].float() for m in (whole[0], model))
    similar = torch.nn.functional.cosine_similarity(expected, found).item()
    assert similar > (0.9 if scheme in ("nf4", "fp4", "intx_weight_only") else 0.99)
    assert changed(model) == set(quantized_linears(whole[0], {}))


@pytest.mark.parametrize("name", CASES)
def test_the_head_is_never_quantized_and_parts_are_apart(name: str) -> None:
    model = CASES[name]().model
    parts = {
        part: set(quantized_linears(model, {"modules": part}))
        for part in ("language_model", "vision_encoder", "projector")
    }
    every = quantized_linears(model, {"modules": list(parts)})
    assert sum(map(len, parts.values())) == len(every)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears - set(every) == {"lm_head"}
    assert all(".layers." in path for path in parts["language_model"])


@pytest.mark.parametrize("modules", ["language_model", "projector", ["vision_encoder"]])
@pytest.mark.parametrize("case", [llava, internvl, qwen3_vl])
def test_skipped_modules_cover_all_others(case: Any, modules: Any) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = case().model
    chosen = quantized_linears(model, {"modules": modules})
    skipped = modules_to_skip(model, chosen)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert should_convert_module(name, skipped) == (name in chosen)


@pytest.mark.parametrize("backend", ["torchao", "bitsandbytes"])
def test_the_vision_encoder_too(backend: str) -> None:
    scheme = "int8_weight_only" if backend == "torchao" else "int8"
    options = quantized(backend, scheme, modules=["language_model", "vision_encoder"])
    model, _ = load_model(settings(**options))
    paths = changed(model)
    assert any("vision_tower" in path for path in paths)
    assert not any("projector" in path for path in paths)


def test_groups_and_bits(whole: Any) -> None:
    options = quantized("torchao", "intx_weight_only", bits=2, group_size=32)
    model, _ = load_model(settings(**options))
    weight: Any = model.model.language_model.layers[0].mlp.up_proj.weight
    assert weight.scale.shape[1] == weight.shape[1] // 32
    assert int(weight.qdata.abs().max()) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8_weight_onyl"}, "Did you mean 'int8_weight_only'"),
        ({}, "has no scheme None"),
        ({"scheme": "int8_dynamic", "bits": 4}, "belongs to the scheme intx"),
        ({"scheme": "int8_dynamic", "group": 4}, "unknown option"),
        ({"scheme": "intx_weight_only", "bits": 9}, "from 1 to 8"),
        ({"scheme": "intx_weight_only", "group_size": 0}, "from 1 on"),
        ({"scheme": "intx_weight_only", "group_size": 100}, "do not divide"),
        ({"scheme": "int8_dynamic", "modules": "decoder"}, "language_model"),
        ({"scheme": "int8_dynamic", "modules": []}, "one or several of"),
    ],
)
def test_wrong_options_of_torchao(options: dict[str, Any], message: str) -> None:
    backend = {"backend": "torchao", **options}
    with pytest.raises(PipelineError, match=message):
        load_model(settings(quantization=backend))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8", "compute_dtype": "bfloat16"}, "belongs to the schemes nf4 and fp4"),
        ({"scheme": "nf4", "compute_dtype": "int8"}, "no floating point type"),
        ({"scheme": "nf3"}, "Did you mean 'nf4'"),
    ],
)
def test_wrong_options_of_bitsandbytes(options: dict[str, Any], message: str) -> None:
    backend = {"backend": "bitsandbytes", **options}
    with pytest.raises(PipelineError, match=message):
        load_model(settings(quantization=backend))


@pytest.mark.parametrize(("backend", "scheme"), SCHEMES)
def test_devices_that_cannot_run_it_are_refused(backend: str, scheme: str) -> None:
    with pytest.raises(PipelineError, match=r"does not run on the device 'mps'.*cpu, cuda"):
        find_quantizer(backend).load_arguments(
            {"scheme": scheme}, device=torch.device("mps"), model=llava().model
        )
    with pytest.raises(PipelineError, match="do not run on the device 'mps'"):
        refuse_device(backend, torch.device("mps"))


def test_four_bits_on_a_cpu_need_tiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel for CPUs with AVX512-BF16 packs tiles of 32 x 64; the tiny model is 96 wide."""
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    with pytest.raises(PipelineError, match=r"cannot pack .*down_proj \(96 -> 64\) on this CPU"):
        find_quantizer("bitsandbytes").load_arguments(
            {"scheme": "nf4"}, device=torch.device("cpu"), model=llava().model
        )


# -- weights that are quantized already ------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of the model but its weights."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    shutil.copytree(model_path("b"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def stored(base: Path) -> Path:
    """An int8 model as transformers alone writes it."""
    model, _ = load_model(settings(**quantized("torchao", "int8_weight_only")))
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize(("backend", "scheme"), SCHEMES)
def test_stored_weights_load_and_reduce(
    backend: str, scheme: str, base: Path, tmp_path: Path
) -> None:
    """As transformers alone writes them."""
    original, _ = load_model(settings(**quantized(backend, scheme)))
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    original.save_pretrained(folder)
    model, processor, run = tr.load_pipeline(
        {
            "model": {"path": str(folder), "device": "cpu"},
            "reduce": [{"strategy": "lftr", "reduction": 8}],
        }
    ).build()
    inputs = prompt(processor)
    with torch.no_grad():
        model(**inputs)
        assert run.receipt.tokens_out == 18
        run.detach()
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert changed(model) == changed(original) != set()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "auto-round", "bits": 4}, "Install that package"),
        ({}, "cannot be loaded"),
        ("int8", "cannot be loaded"),
    ],
)
def test_stored_methods_that_cannot_be_read(config: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path("b"), folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, "quantization_config": config}))
    with pytest.raises(PipelineError, match=message):
        load_model(settings(folder))


def test_stored_weights_are_not_quantized_again(stored: Path) -> None:
    with pytest.raises(PipelineError, match=r"quantized already \(torchao\): it cannot be quantiz"):
        load_model(settings(stored, **quantized("bitsandbytes", "int8")))


def test_stored_weights_are_not_pruned(stored: Path) -> None:
    prune = {"prune": {"backend": "structured", "mlp_ratio": 0.3}}
    with pytest.raises(PipelineError, match=r"cannot be pruned any more.*pruned first"):
        load_model(settings(stored, vision_encoder=prune))
