"""Answers from captured pictures are those of the attached model, receipts included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tokenreduce as tr
from support.tiny_models import CASES
from tokenreduce.errors import EvaluationError, MediaError, PipelineError
from tokenreduce_integrations.evaluation.answering import (
    AttachedAnswerer,
    encode_batch,
    receipts_of,
)
from tokenreduce_integrations.evaluation.cached import CachedAnswerer, Captured
from tokenreduce_integrations.evaluation.data import Questions, load_questions
from tokenreduce_integrations.evaluation.schema import PARTS
from tokenreduce_integrations.testbed.models import load

from .conftest import pipeline

NEEDS = (
    "class_attention",
    "received_attention",
    "shallow_class_attention",
    "keys",
    "prompt_embeddings",
)
STAGES: dict[str, list[dict[str, Any]]] = {
    "features": [{"strategy": "lftr", "reduction": 8}],
    "keeps random tokens": [{"strategy": "random", "keep_ratio": 0.3}],
    "class attention and keys": [{"strategy": "visionzip", "keep": 20}],
    "adaptive": [{"strategy": "prumerge"}],
    "a budget of cost": [{"strategy": "lftr", "flops": 5e7}],
    "the prompt": [{"strategy": "mmtok", "reduction": 8}],
    "two stages": [{"strategy": "divprune", "keep": 60}, {"strategy": "tome", "keep": 12}],
    "inside the encoder": [{"strategy": "tome", "site": "vision", "reduction": 4}],
    "inside and after": [
        {"strategy": "tome", "site": "vision", "keep": 72},
        {"strategy": "text-guided-sampler", "keep": 9},
    ],
}


@pytest.fixture(scope="module")
def captured(model_and_processor: tuple[Any, Any]) -> Captured:
    return Captured(*model_and_processor, NEEDS)


@pytest.mark.parametrize("case", STAGES)
def test_cached_answers_are_those_of_the_attached_model(
    case: str, model_and_processor: tuple[Any, Any], captured: Captured, questions: Questions
) -> None:
    model, processor = model_and_processor
    stages = pipeline(*STAGES[case]).stages
    samples = questions.samples[:24]
    with tr.attach(model, stages, processor=processor) as run:
        expected = AttachedAnswerer(model, processor, run, max_new_tokens=1)(samples)
    found = CachedAnswerer(captured, stages)(samples)
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.receipt for a in found] == [a.receipt for a in expected]
    assert all(a.receipt["tokens_out"] < 144 for a in found)


def test_clips_too() -> None:
    model, processor = load("video")
    samples = load_questions("testbed-video,seed=9,scenes=1").samples
    for strategy in ("flashvid", "mmtok"):
        stages = pipeline({"strategy": strategy, "reduction": 8}).stages
        with tr.attach(model, stages, processor=processor) as run:
            expected = AttachedAnswerer(model, processor, run, max_new_tokens=1)(samples)
        needs = tuple(stages[0].reducer.needs)
        found = CachedAnswerer(Captured(model, processor, needs), stages)(samples)
        assert [a.text for a in found] == [a.text for a in expected]
        assert [a.receipt for a in found] == [a.receipt for a in expected]
        assert {a.receipt["items"][0]["modality"] for a in found} == {"video"}


def test_the_unreduced_model(
    model_and_processor: tuple[Any, Any], captured: Captured, questions: Questions
) -> None:
    model, processor = model_and_processor
    stages = pipeline({"strategy": "lftr", "reduction": 8}).stages
    with tr.attach(model, stages, processor=processor) as run, run.disabled():
        expected = AttachedAnswerer(model, processor, run, max_new_tokens=1)(questions.samples)
    found = CachedAnswerer(captured, stages, reduced=False)(questions.samples)
    assert [a.text for a in found] == [a.text for a in expected]
    assert [a.receipt for a in found] == [a.receipt for a in expected]
    assert "disabled" in found[0].receipt["reason"]


def test_nothing_stays_on_the_model(
    model_and_processor: tuple[Any, Any], questions: Questions
) -> None:
    model, processor = model_and_processor
    before = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    captured = Captured(model, processor, NEEDS)
    CachedAnswerer(captured, pipeline(*STAGES["inside the encoder"]).stages)(questions.samples[:4])
    after = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert before == after


def test_each_receipt_is_that_of_the_question_alone(
    model_and_processor: tuple[Any, Any], questions: Questions
) -> None:
    model, processor = model_and_processor
    with tr.attach(model, pipeline(*STAGES["adaptive"]).stages, processor=processor) as run:
        answer = AttachedAnswerer(model, processor, run, max_new_tokens=2)
        together = answer(questions.samples[:12])
        for sample, batched in zip(questions.samples[:12], together, strict=True):
            [alone] = answer([sample])
            assert batched.receipt == alone.receipt
            whole = run.receipt.as_dict()
            del whole["selection_ms"]
            assert batched.receipt == whole
            assert set(batched.seconds) == set(PARTS)
            assert all(value >= 0 for value in batched.seconds.values())


def test_what_a_processor_cannot_take_is_refused(
    model_and_processor: tuple[Any, Any], questions: Questions
) -> None:
    _, processor = model_and_processor
    clip = replace(questions.samples[0], modality="video")
    with pytest.raises(MediaError, match="takes no clips"):
        encode_batch(processor, [clip], torch.device("cpu"))
    with pytest.raises(PipelineError, match="no chat template"):
        encode_batch(object(), questions.samples[:1], torch.device("cpu"))


def test_decoders_that_read_more_are_refused(questions: Questions) -> None:
    from tokenreduce_integrations.evaluation.cached import _require_plain

    embeds = torch.zeros(2, 5, 4)
    model = CASES["llava"]().model
    _require_plain(model, {"inputs_embeds": embeds, "position_ids": torch.zeros(2, 5)})
    for more in (
        {"position_ids": torch.zeros(3, 2, 5)},
        {"attention_mask": torch.zeros(2, 1, 5, 5)},
        {"per_layer_inputs": torch.zeros(2, 5, 3, 4)},
    ):
        with pytest.raises(EvaluationError, match=next(iter(more))):
            _require_plain(model, {"inputs_embeds": embeds, **more})


def test_receipts_of_a_batch() -> None:
    case = CASES["llava"]()
    reducer = tr.create_strategy("norm-topk", keep=3)
    with tr.attach(case.model, reducer) as run:
        case.model(**case.inputs)
        whole = run.receipt
    lengths = [case.inputs["input_ids"].shape[1]] * len(case.inputs["input_ids"])
    parts = receipts_of(whole, lengths)
    assert sum(part["tokens_out"] for part in parts) == whole.tokens_out
    assert sum(part["kv_bytes"] for part in parts) == whole.kv_bytes
