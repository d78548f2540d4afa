"""What else runs in a pruned tower, against independent recomputations: signals, stages inside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tokenreduce as tr
from support import recorder, reference
from support.reducers import LargestNorm, MatchesKeys
from support.tiny_models import CASES, Case
from support.tower_oracle import expected
from support.tower_reference import TowerOracle
from tokenreduce.backends import find_encoder_pruner
from tokenreduce.plugins import installed

STEPS = 3
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
