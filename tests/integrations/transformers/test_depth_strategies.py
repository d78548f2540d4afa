"""Every registered strategy of the decoder site on real models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tokenreduce as tr
from support.tiny_models import CASES, Case
from tokenreduce.plugins import installed

STRATEGIES = [name for name, record in installed().strategies.items() if "decoder" in record.sites]
STEPS = 3


def stage_of(name: str, tmp_path: Path) -> tr.Stage:
    record = installed().strategies[name]
    if record.needs_weights:
        reducer = tr.create_strategy(name, weights=str(router_weights(tmp_path)))
    elif record.count == "adaptive":
        reducer = tr.create_strategy(name)
    else:
        reducer = tr.create_strategy(name, keep_ratio=0.5)
    return tr.Stage(reducer=reducer, site="decoder", layer=2)


def router_weights(folder: Path) -> Path:
    """A router of the width of the tiny models."""
    file = folder / "router.safetensors"
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(32, 128, generator=generator)
    second = torch.randn(2, 32, generator=generator)
    save_file({"fc1.weight": first, "fc2.weight": second}, file)
    return file


def generate(case: Case) -> torch.Tensor:
    with torch.no_grad():
        result = case.model.generate(**case.batch(), max_new_tokens=STEPS, do_sample=False)
    return result[:, case.inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("name", STRATEGIES)
def test_runs_inside_the_llm_alone_and_in_a_batch(name: str, tmp_path: Path) -> None:
    case = CASES["llava"]()
    stage = stage_of(name, tmp_path)
    with tr.attach(case.model, stage) as run:
        together = generate(case)
        receipt, kept = run.receipt, [item.kept for item in run.reductions]
        assert receipt.tokens_per_layer[:2] == (32, 32)
        if stage.reducer.count_class == "exact":
            assert receipt.tokens_per_layer[2:] == (16, 16)
        assert receipt.tokens_out < 32 or receipt.reason
        for row in range(2):
            real = case.inputs["attention_mask"][row].bool()
            inputs = {
                "input_ids": case.inputs["input_ids"][row : row + 1, real],
                "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
                "pixel_values": case.inputs["pixel_values"][row : row + 1],
            }
            assert torch.equal(generate(Case(case.model, inputs, ()))[0], together[row])
            assert torch.equal(run.reductions[0].kept, kept[row])


@pytest.mark.parametrize("name", STRATEGIES)
def test_runs_on_clips_and_tiles(name: str, tmp_path: Path) -> None:
    grids_only = installed().strategies[name].needs_grid
    for model in ("qwen3-vl",) if grids_only else ("onevision", "qwen3-vl"):
        case = CASES[model]()
        with tr.attach(case.model, stage_of(name, tmp_path)) as run:
            assert generate(case).shape == (2, STEPS)
            assert run.receipt.tokens_out < run.receipt.tokens_in or run.receipt.reason
