"""What else runs in a pruned tower, against independent recomputations: signals, stages inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import tokenreduce as tr
from support import recorder, reference
from support.reducers import LargestNorm, MatchesKeys
from support.timm_llava import timm_config
from support.tiny_models import CASES, Case, lively
from support.tower_oracle import expected
from support.tower_reference import TowerOracle
from tokenreduce.backends import find_encoder_pruner
from tokenreduce.plugins import installed
from tokenreduce_integrations.pruning.encoders import Part, find_encoder
from tokenreduce_integrations.pruning.surgery import plan_of
from tokenreduce_integrations.pruning.timm_tower import adapt_timm_tower

STEPS = 3
SQUARE = {"height": 56, "width": 56}
#: Image processors as the models' authors configure them, for the tiny towers.
PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": lambda: transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE),
    "llava-next": lambda: transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=SQUARE, image_grid_pinpoints=[[56, 112], [112, 112]]
    ),
    "onevision": lambda: transformers.LlavaOnevisionImageProcessor(
        size=SQUARE, image_grid_pinpoints=[[56, 112], [112, 112]]
    ),
    "internvl": lambda: transformers.GotOcr2ImageProcessor(size=SQUARE),
    "qwen2-vl": lambda: transformers.Qwen2VLImageProcessor(patch_size=14),
    "qwen2.5-vl": lambda: transformers.Qwen2VLImageProcessor(patch_size=14),
    "qwen3-vl": lambda: transformers.Qwen2VLImageProcessor(patch_size=16),
    "timm": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}
    ),
}
NARROWER = {"head_ratio": 0.5, "mlp_ratio": 0.3}
TOWERS = ("llava", "llava-next", "onevision", "internvl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


def pruned(name: str, **options: float) -> Case:
    case = CASES[name]()
    if name == "onevision":
        # Stages inside its encoder are refused for clips.
        ids = case.inputs["input_ids"]
        case.inputs["input_ids"] = ids.masked_fill(ids == case.items[2].token, 30)
        del case.inputs["pixel_values_videos"]
        case = Case(case.model, case.inputs, case.items[:2])
    find_encoder_pruner("structured").prune(case.model, options, None)
    return case


@pytest.fixture
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    status = installed().load("recorder", recorder)
    assert status.state == "loaded", status.error
    recorder.SEEN.clear()
    yield recorder.SEEN
    installed().strategies.remove("recorder")


@pytest.mark.parametrize("name", [name for name in TOWERS if name != "onevision"])
def test_signals_are_those_of_the_heads_that_are_left(
    name: str, recorded: dict[str, list[Tensor]]
) -> None:
    case = pruned(name, **NARROWER)
    names = ("received_attention", "keys", "queries")
    if not name.startswith("qwen"):
        names = (*names, "class_attention")
    with (
        tr.attach(case.model, tr.create_strategy("recorder", keep=2, names=names)),
        torch.no_grad(),
    ):
        case.model(**case.batch())
    oracle = expected(name, case)
    for signal in names:
        for item, found, whole in zip(case.items, recorded[signal], oracle[signal], strict=True):
            # Strategies are not asked about newlines.
            wanted = whole[[i for i in range(len(item.coords)) if i not in item.protected]]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reducer", [MatchesKeys(), LargestNorm()], ids=["merges", "drops"])
@pytest.mark.parametrize("name", TOWERS)
def test_stages_inside_a_pruned_tower(name: str, reducer: tr.Reducer) -> None:
    case = pruned(name, **NARROWER, depth_ratio=0.3)
    wanted_ids, wanted = reference.greedy(case, TowerOracle(case, reducer, 0.5), STEPS)
    stage = tr.Stage(reducer=reducer.with_budget(keep_ratio=0.5), site="vision")
    with tr.attach(case.model, stage) as run, torch.no_grad():
        result = case.model.generate(
            **case.batch(),
            do_sample=False,
            max_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert run.receipt.tokens_out < run.receipt.tokens_in
    ids = result.sequences[:, case.inputs["input_ids"].shape[1] :]
    assert torch.equal(ids, wanted_ids)
    assert (torch.stack(result.logits) - wanted).abs().max() < 2e-5


def timm_llava() -> Any:
    model = lively(transformers.LlavaForConditionalGeneration(timm_config()))
    adapt_timm_tower(model)
    return model


def silence(module: Any, part: Part, groups: list[int]) -> tuple[int, ...]:
    """Have some heads or channels give nothing, and their readers weigh much; their channels."""
    dead = [g * part.group + c for g in groups for c in range(part.group)]
    writer = getattr(module, part.writers[-1])
    # Values come last where queries, keys and values are written by one layer.
    rows = [writer.out_features - part.channels + channel for channel in dead]
    with torch.no_grad():
        writer.weight[rows] = 0
        if writer.bias is not None:
            writer.bias[rows] = 0
        getattr(module, part.reader).weight[:, dead] *= 100
    return tuple(dead)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_tell_what_gives_nothing(name: str, tmp_path: Path) -> None:
    """Magnitude would keep what calibration drops: silent channels that are read with weight."""
    for i in range(2):
        Image.effect_noise((112, 112), 40 + 20 * i).convert("RGB").save(tmp_path / f"{i}.png")
    model = timm_llava() if name == "timm" else CASES[name]().model
    encoder = find_encoder(model)
    dead: dict[str, tuple[int, ...]] = {}
    # LLaVA reads the second to last hidden state, what the last block gives is not read.
    last = len(encoder.blocks) - (2 if name.startswith("llava") else 1)
    for block in encoder.blocks[: last + 1]:
        assert block.attention is not None
        assert block.mlp is not None
        for part, groups in ((block.attention, [1]), (block.mlp, list(range(16)))):
            dead[f"{part.path}.{part.reader}"] = silence(
                encoder.module.get_submodule(part.path), part, groups
            )
    options = {
        "head_ratio": 1 / encoder.blocks[0].attention.groups,
        "mlp_ratio": 16 / encoder.blocks[0].mlp.groups,
        "calibration": str(tmp_path),
    }
    processor = SimpleNamespace(image_processor=PROCESSORS[name]())
    find_encoder_pruner("structured").prune(model, options, processor)
    plan = plan_of(model)
    assert plan is not None
    for path, gone in dead.items():
        kept = plan.slices[path].columns
        assert kept is not None
        assert not {*gone} & {*kept}
        assert len(gone) + len(kept) == len({*gone} | {*kept})
