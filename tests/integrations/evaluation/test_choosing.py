"""Which strategies run on a model, from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.tiny_models import CASES
from tokenreduce.errors import BudgetError, EvaluationError, PipelineError, UnsupportedModel
from tokenreduce.plugins import installed
from tokenreduce_integrations.evaluation.choosing import Choice, choose, evidence


def by_place(choices: list[Choice]) -> dict[tuple[str, str], Choice]:
    return {(choice.strategy, choice.site): choice for choice in choices}


def test_every_strategy_is_listed_with_a_reason_or_not() -> None:
    found = choose("testbed:b", {"reduction": 8})
    listed = by_place(found)
    for record in installed().strategies.values():
        for site in record.sites:
            assert ((record.name, site) in listed) == (not record.wraps and site != "frames")
    assert listed["visionzip", "projector"].reason == ""
    assert "joint_text_embeddings" in listed["trim", "projector"].reason
    assert "What would work" not in listed["trim", "projector"].reason
    assert "trained weights" in listed["space-to-depth", "projector"].reason
    assert listed["vtw", "decoder"].reason
    able = [not choice.reason for choice in found]
    assert able == sorted(able, reverse=True)


def test_the_order_is_that_of_the_evidence() -> None:
    assert evidence()
    for task in (None, "count"):
        able = [c for c in choose("testbed:b", {"reduction": 16}, task=task) if not c.reason]
        shares = [choice.share for choice in able]
        assert shares == sorted(shares, reverse=True)
        known = [choice for choice in able if choice.evidence]
        assert {e.reduction for c in known for e in c.evidence if c.strategy == "lftr"} == {16}
        assert {c.strategy for c in known} >= {"lftr", "divprune", "random", "visionzip"}
        assert known[0].share > next(c.share for c in known if c.strategy == "random")


@pytest.mark.parametrize(
    ("budget", "reduction"),
    [({"keep": 36}, 4), ({"keep_ratio": 0.05}, 16), ({"reduction": 9}, 8)],
)
def test_the_nearest_reduction_is_evidence(budget: dict[str, float], reduction: int) -> None:
    lftr = by_place(choose("testbed:b", budget))["lftr", "projector"]
    assert {e.reduction for e in lftr.evidence} == {reduction}


def test_no_weight_is_read(tmp_path: Path) -> None:
    model = CASES["qwen2.5-vl"]().model
    model.config.save_pretrained(tmp_path)
    listed = by_place(choose(str(tmp_path), {"keep": 64}))
    assert listed["divprune", "projector"].reason == ""
    assert "class_attention" in listed["visionzip", "projector"].reason
    assert by_place(choose(str(tmp_path / "config.json"), {"keep": 64})).keys() == listed.keys()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="cannot be loaded"):
        choose(str(tmp_path), {"keep": 64})
    with pytest.raises(BudgetError):
        choose("testbed:b", {"keep": 0})
    with pytest.raises(EvaluationError, match="'count'"):
        choose("testbed:b", {"keep": 64}, task="cuont")
    from transformers import BertConfig

    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises((PipelineError, UnsupportedModel)):
        choose(str(tmp_path), {"keep": 64})
    assert torch.get_default_device() == torch.device("cpu")
