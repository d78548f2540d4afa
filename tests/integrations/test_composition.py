"""Reduction, quantization and a pruned encoder together: built, run, detached, saved, built."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support.timm_llava import write_timm_llava
from tokenreduce.errors import PipelineError, UnknownName, UnsupportedModel
from tokenreduce_integrations.pruning.surgery import PLAN_FILE
from tokenreduce_integrations.testbed.models import model_path

pytest.importorskip("torchao", reason="needs the extra quant")
pytest.importorskip("bitsandbytes", reason="needs the extra quant")

QUANTIZERS: dict[str, dict[str, Any] | None] = {
    "whole": None,
    "ao-int8": {"backend": "torchao", "scheme": "int8_weight_only"},
    "ao-int8-dynamic": {"backend": "torchao", "scheme": "int8_dynamic"},
    "ao-intx": {"backend": "torchao", "scheme": "intx_weight_only"},
    "ao-float8": {"backend": "torchao", "scheme": "float8_weight_only"},
    "ao-int8-everywhere": {
        "backend": "torchao",
        "scheme": "int8_weight_only",
        "modules": ["language_model", "vision_encoder", "projector"],
    },
    "bnb-int8": {"backend": "bitsandbytes", "scheme": "int8"},
    "bnb-nf4": {"backend": "bitsandbytes", "scheme": "nf4"},
    "bnb-fp4": {"backend": "bitsandbytes", "scheme": "fp4"},
    "quanto-int8": {"backend": "quanto", "scheme": "int8"},
    "quanto-float8": {"backend": "quanto", "scheme": "float8"},
    "quanto-int4": {"backend": "quanto", "scheme": "int4"},
}
#: Compiles an extension at first use, for minutes.
SLOW = ("quanto-int4",)
ENCODERS: dict[str, dict[str, Any] | None] = {
    "unpruned": None,
    "mlp": {"backend": "structured", "mlp_ratio": 0.3},
    "heads": {"backend": "structured", "head_ratio": 0.5},
    "depth": {"backend": "structured", "depth_ratio": 0.4},
    "timm": {"backend": "structured", "mlp_ratio": 0.3, "head_ratio": 0.5},
}
STAGES: dict[str, list[dict[str, Any]]] = {
    "lftr": [{"strategy": "lftr", "reduction": 8}],
    "visionzip": [{"strategy": "visionzip", "reduction": 8}],
    "tome-inside-encoder": [{"strategy": "tome", "site": "vision", "keep_ratio": 0.5}],
    "lftr+fastv-inside-llm": [
        {"strategy": "lftr", "reduction": 4},
        {"strategy": "fastv", "site": "decoder", "layer": 2, "keep_ratio": 0.5},
    ],
}
KEPT = {"lftr": 18, "visionzip": 18, "tome-inside-encoder": 72, "lftr+fastv-inside-llm": 18}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Any:
    """bitsandbytes logs every cast."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_timm_llava(tmp_path_factory.mktemp("timm") / "model")


def prompt(processor: Any, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    text = "<image> " * 144 + "USER: what digit is shown ? ASSISTANT:"
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    return {"input_ids": ids, "pixel_values": pixels.to(dtype)}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def pipeline(path: str, quantizer: Any, encoder: Any, stages: Any) -> tr.Pipeline:
    model = {"path": path, "dtype": "float32", "device": "cpu"}
    if quantizer is not None:
        model["quantization"] = quantizer
    if encoder is not None:
        model["vision_encoder"] = {"prune": encoder}
    return tr.load_pipeline({"model": model, "reduce": stages})


def check(path: str, quantizer: Any, encoder: Any, stages: str, folder: Path) -> None:
    """Builds, generates, detaches, and comes back bit-equal from a folder."""
    built = pipeline(path, quantizer, encoder, STAGES[stages]).build()
    model, processor, run = built
    inputs = prompt(processor)
    reduced = logits(model, inputs)
    assert run.receipt.tokens_in == 144
    assert run.receipt.tokens_out == KEPT[stages]
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with run.disabled():
        unreduced = logits(model, inputs)
    built.save_pretrained(folder)
    assert (folder / PLAN_FILE).exists() == (encoder is not None)
    again = tr.BuiltPipeline.from_pretrained(folder)
    assert type(again.model) is type(model)
    assert torch.equal(logits(again.model, inputs), reduced)
    assert again.attachment.receipt.tokens_out == KEPT[stages]
    repeated = again.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(repeated, answer)
    run.detach()
    assert torch.equal(logits(model, inputs), unreduced)
    assert not torch.equal(unreduced, reduced)


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "quantizer",
    [pytest.param(q, marks=[pytest.mark.slow] if q in SLOW else []) for q in QUANTIZERS],
)
def test_every_combination(
    quantizer: str, encoder: str, stages: str, tmp_path: Path, timm_folder: Path
) -> None:
    if quantizer.startswith("quanto"):
        pytest.importorskip("optimum.quanto", reason="needs the extra quanto")
    path = str(timm_folder) if encoder == "timm" else "testbed:b"
    check(path, QUANTIZERS[quantizer], ENCODERS[encoder], stages, tmp_path)


def test_half_precision_comes_back(tmp_path: Path) -> None:
    built = tr.load_pipeline(
        {
            "model": {
                "path": "testbed:b",
                "dtype": "bfloat16",
                "device": "cpu",
                "quantization": QUANTIZERS["ao-int8"],
                "vision_encoder": {"prune": ENCODERS["heads"]},
            },
            "reduce": STAGES["lftr"],
        }
    ).build()
    inputs = prompt(built.processor, torch.bfloat16)
    expected = logits(built.model, inputs)
    built.save_pretrained(tmp_path)
    model, _, _ = tr.load_pipeline(tmp_path).build()
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), expected)


def test_a_saved_pipeline_takes_overrides(tmp_path: Path) -> None:
    built = pipeline("testbed:b", None, ENCODERS["mlp"], STAGES["lftr"]).build()
    built.save_pretrained(tmp_path / "saved")
    loaded = tr.load_pipeline(str(tmp_path / "saved"), ["reduce.0.reduction=4"])
    assert loaded.model is not None
    assert loaded.model.path == str(tmp_path / "saved")
    assert loaded.stages[0].reducer.reduction == 4
    text = (tmp_path / "saved" / "pipeline.yaml").read_text()
    assert str(tmp_path) not in text


def test_a_pruned_model_is_not_pruned_again(tmp_path: Path) -> None:
    pipeline("testbed:b", None, ENCODERS["mlp"], STAGES["lftr"]).build().save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="was pruned before it was saved"):
        pipeline(str(tmp_path), None, ENCODERS["heads"], STAGES["lftr"]).build()


def test_a_pruned_model_is_quantized_later(tmp_path: Path) -> None:
    pipeline("testbed:b", None, ENCODERS["heads"], STAGES["lftr"]).build().save_pretrained(tmp_path)
    built = pipeline(str(tmp_path), QUANTIZERS["ao-int8"], None, STAGES["lftr"]).build()
    at_once = pipeline("testbed:b", QUANTIZERS["ao-int8"], ENCODERS["heads"], STAGES["lftr"])
    inputs = prompt(built.processor)
    assert torch.equal(logits(built.model, inputs), logits(at_once.build().model, inputs))


def test_presets() -> None:
    preset = tr.load_pipeline("lftr-16x-int8", ["model.path=testbed:b", "model.device=cpu"])
    model, processor, run = preset.build()
    with run:
        logits(model, prompt(processor, torch.bfloat16))
        assert run.receipt.tokens_out == 9
    assert type(model.model.language_model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"


# -- folders, and repositories of the hub ----------------------------------------------------------


def uploaded(folder: Path, name: str, cache: Path) -> None:
    """A folder as the hub's cache holds it once it was uploaded and downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = repository / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)


@pytest.mark.parametrize("quantizer", ["whole", "ao-int8", "bnb-nf4", "quanto-int8"])
def test_a_pruned_model_on_the_hub(
    quantizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantizer.startswith("quanto"):
        pytest.importorskip("optimum.quanto", reason="needs the extra quanto")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    built = pipeline("testbed:b", QUANTIZERS[quantizer], ENCODERS["timm"], STAGES["lftr"]).build()
    inputs = prompt(built.processor)
    expected = logits(built.model, inputs)
    built.save_pretrained(tmp_path / "saved")
    uploaded(tmp_path / "saved", "someone/pruned", tmp_path / "cache")
    snapshot = next((tmp_path / "cache").glob("models--*/snapshots/*"))
    for source in ("someone/pruned", snapshot):
        again = tr.BuiltPipeline.from_pretrained(source)
        assert torch.equal(logits(again.model, inputs), expected)
        named = pipeline(str(source), None, None, STAGES["lftr"]).build()
        assert torch.equal(logits(named.model, inputs), expected)
    with pytest.raises(PipelineError, match=r"was pruned before it was saved|quantized already"):
        pipeline("someone/pruned", None, ENCODERS["heads"], STAGES["lftr"]).build()
    with pytest.raises(PipelineError, match=r"someone/else.*no such folder, and no pipeline.yaml"):
        tr.BuiltPipeline.from_pretrained("someone/else")


def test_a_folder_is_saved_to_again_and_moved(tmp_path: Path) -> None:
    built = pipeline("testbed:b", QUANTIZERS["ao-int8"], ENCODERS["timm"], STAGES["lftr"]).build()
    inputs = prompt(built.processor)
    expected = logits(built.model, inputs)
    built.model.generation_config.max_new_tokens = 7
    for _ in range(2):
        built.save_pretrained(tmp_path / "saved")
        built = tr.BuiltPipeline.from_pretrained(tmp_path / "saved")
    assert built.model.generation_config.max_new_tokens == 7
    (tmp_path / "saved").rename(tmp_path / "moved")
    again = tr.BuiltPipeline.from_pretrained(tmp_path / "moved")
    assert torch.equal(logits(again.model, inputs), expected)


@pytest.mark.parametrize("quantizer", ["whole", "ao-int8", "bnb-int8", "quanto-int8"])
def test_tied_weights_stay_tied(quantizer: str, tmp_path: Path) -> None:
    if quantizer.startswith("quanto"):
        pytest.importorskip("optimum.quanto", reason="needs the extra quanto")
    shutil.copytree(model_path("b"), tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tied = pipeline(
        str(tmp_path / "model"), QUANTIZERS[quantizer], ENCODERS["heads"], STAGES["lftr"]
    )
    built = tied.build()
    inputs = prompt(built.processor)
    expected = logits(built.model, inputs)
    built.save_pretrained(tmp_path / "saved")
    again = tr.BuiltPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again.model, inputs), expected)
    for model in (built.model, again.model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_folder_that_held_another_model(tmp_path: Path) -> None:
    pipeline("testbed:b", None, ENCODERS["heads"], STAGES["lftr"]).build().save_pretrained(tmp_path)
    built = pipeline("testbed:b", None, None, STAGES["lftr"]).build()
    built.save_pretrained(tmp_path)
    assert not (tmp_path / PLAN_FILE).exists()
    again = tr.BuiltPipeline.from_pretrained(tmp_path)
    inputs = prompt(built.processor)
    assert torch.equal(logits(again.model, inputs), logits(built.model, inputs))


@pytest.mark.parametrize(
    ("pruned", "change", "error", "message"),
    [
        ("heads", None, PipelineError, "surgery.json that was written beside the weights is miss"),
        ("depth", {"kept": [0, 1]}, UnsupportedModel, "not the plan of these weights"),
        ("depth", {"kept": [0, 1, 2, 3, 4]}, UnsupportedModel, "not the plan of these weights"),
        ("heads", {"encoder": "model.language_model"}, UnsupportedModel, "does not fit"),
        ("heads", {"kept": []}, PipelineError, "distinct indices"),
        ("heads", {"kept": [0, 0]}, PipelineError, "distinct indices"),
        (
            "heads",
            {"slices": {"encoder.layers.0.mlp.fc1": {"rows": [-1]}}},
            PipelineError,
            "distin",
        ),
        (
            "heads",
            {"slices": {"encoder.layers.0.mlp.fc1": {"rows": [999]}}},
            UnsupportedModel,
            "999",
        ),
        ("heads", {"attributes": {"": {"forward": None}}}, PipelineError, "whole numbers"),
        ("heads", {"attributes": {"": {"forward": 1}}}, UnsupportedModel, "forward is no number"),
        (
            "heads",
            {"settings": [{"path": "config", "name": "auto_map", "before": 1, "after": {}}]},
            PipelineError,
            "config.auto_map to whole numbers",
        ),
        (
            "heads",
            {"settings": [{"path": "config.__class__", "name": "x", "before": 1, "after": 1}]},
            PipelineError,
            "changes the configuration, not",
        ),
    ],
)
def test_plans_that_are_missing_or_were_changed(
    pruned: str, change: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    built = pipeline("testbed:b", None, ENCODERS[pruned], STAGES["lftr"]).build()
    built.save_pretrained(tmp_path)
    plan = tmp_path / PLAN_FILE
    document = json.loads(plan.read_text())
    plan.unlink()
    if change is not None:
        plan.write_text(json.dumps(document | change))
    with pytest.raises(error, match=message):
        tr.BuiltPipeline.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_are_not_saved_with_the_model(tmp_path: Path) -> None:
    built = pipeline("testbed:b", None, ENCODERS["heads"], STAGES["lftr"]).build()
    inputs = prompt(built.processor)
    expected = logits(built.model, inputs)
    built.attachment.detach()
    targets = r".*language_model.*(q_proj|v_proj)"
    adapted = peft.get_peft_model(built.model, peft.LoraConfig(r=4, target_modules=targets))
    with tr.attach(adapted, built.pipeline) as run:
        assert torch.equal(logits(adapted, inputs), expected)
        assert run.receipt.tokens_out == KEPT["lftr"]
    with pytest.raises(PipelineError, match=r"adapters of peft.*Merge them"):
        built.save_pretrained(tmp_path / "saved")
    merged = adapted.merge_and_unload()
    assert merged is built.model
    built.save_pretrained(tmp_path / "saved")
    again = tr.BuiltPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again.model, inputs), expected)


def test_code_beside_a_model_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the user asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    pipeline("testbed:b", None, None, STAGES["lftr"]).build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(PipelineError, match="without code of its own"):
        tr.BuiltPipeline.from_pretrained(tmp_path)


def test_a_stage_that_no_file_can_name_is_not_saved(tmp_path: Path) -> None:
    built = pipeline("testbed:b", None, None, STAGES["lftr"]).build()
    assert built.pipeline.model is not None

    class Own(tr.Scorer):
        def score(self, tokens: tr.VisualTokens) -> Tensor:
            return tokens.features.float().norm(dim=-1)

    own = tr.Pipeline(stages=(tr.Stage(reducer=Own(keep=4)),), model=built.pipeline.model)
    with pytest.raises(PipelineError, match="not a registered strategy"):
        own.build().save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    built = pipeline("testbed:b", None, None, STAGES["lftr"]).build()
    (tmp_path / "file").write_text("")
    with pytest.raises(PipelineError, match="cannot be written"):
        built.save_pretrained(tmp_path / "file")


def test_unknown_backends() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'torchao'"):
        pipeline("testbed:b", {"backend": "torch_ao"}, None, STAGES["lftr"])
    with pytest.raises(UnknownName, match="Did you mean 'torch_pruning'"):
        pipeline("testbed:b", None, {"backend": "torch-pruning"}, STAGES["lftr"])


def test_stages_inside_a_timm_tower_do_what_they_do_inside_the_bare_one(timm_folder: Path) -> None:
    stages = STAGES["tome-inside-encoder"]
    model, processor, run = pipeline(str(timm_folder), None, None, stages).build()
    inputs = prompt(processor)
    logits(model, inputs)
    [inside] = run.reductions
    run.detach()
    bare = model.model.vision_tower.timm_model
    stage = tr.Stage(reducer=tr.create_strategy("tome", keep_ratio=0.5), site="vision")
    with tr.attach(bare, stage) as alone, torch.no_grad():
        bare(inputs["pixel_values"])
        [expected] = alone.reductions
    # The bare tower's sequence begins with a class token.
    assert torch.equal(inside.kept, expected.kept[1:] - 1)
    assert torch.equal(inside.assignment, expected.assignment[1:] - 1)
