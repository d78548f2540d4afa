"""Models that answer by denoising: the attachment against the unmodified model and an independent
recomputation of the denoising loop."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import tokenreduce as tr
from support import denoising_reference, reference, support_matrix
from support.denoising_reference import BLOCKS, CANVAS, KEEP_ALL, STEPS, denoised, generate
from support.reducers import EveryOther, UnevenRandom
from support.tiny_models import Case, llava, words
from support.traces import anatomy
from tokenreduce.errors import (
    AttachmentError,
    BudgetError,
    PipelineError,
    UnsupportedGeneration,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce_integrations.accounting.curves import language_model_cost

# Each step takes the logits of the one before: rounding grows. What differs, differs by about 4.
TOLERANCE = 1e-3
FAMILIES = {
    "diffusion-gemma": denoising_reference.case,
    "diffusion-gemma-both-ways": partial(denoising_reference.case, both_ways=True),
}
STATIC = {"cache_implementation": "static", "disable_compile": True}
every_family = pytest.mark.parametrize("name", FAMILIES)
every_reducer = pytest.mark.parametrize(
    "reducer", [UnevenRandom(), EveryOther(reduction=3)], ids=["drop", "merge"]
)


def schedule(inner: tr.Reducer, from_step: int) -> tr.Reducer:
    return tr.create_strategy("denoising-schedule", inner=inner, from_step=from_step)


def canvas() -> torch.Tensor:
    return torch.tensor([words(CANVAS, 5), words(CANVAS, 6)])


def forward(case: Case) -> torch.Tensor:
    """One step on a canvas that is given, with the prompts."""
    mask = torch.nn.functional.pad(case.inputs["attention_mask"], (0, CANVAS), value=1)
    with torch.no_grad():
        return case.model(
            **case.batch(), decoder_input_ids=canvas(), decoder_attention_mask=mask
        ).logits


@every_family
@pytest.mark.parametrize("reducer", [KEEP_ALL, schedule(KEEP_ALL, 2)], ids=["plain", "schedule"])
def test_keep_all_is_bit_identical(name: str, reducer: tr.Reducer) -> None:
    case = FAMILIES[name]()
    before, answer = forward(case), generate(case)
    with tr.attach(case.model, reducer) as run:
        assert torch.equal(forward(case), before)
        generate(case).check(answer, tolerance=0)
        assert run.receipt.ratio == 1.0
        assert run.receipt.steps == ()


@every_family
@every_reducer
def test_generation_equals_an_independent_recomputation(name: str, reducer: tr.Reducer) -> None:
    case = FAMILIES[name]()
    expected = denoised(case, reducer)
    with tr.attach(case.model, reducer) as run:
        generate(case).check(expected, TOLERANCE)
        assert [item.tokens_in for item in run.receipt.items] == [16, 16]
        assert run.receipt.tokens_out < run.receipt.tokens_in
        assert run.receipt.steps == ()
    for column in ("image", "generate", "batch"):
        support_matrix.proved(name, column)


@every_family
@every_reducer
@pytest.mark.parametrize("from_step", [1, 2])
def test_a_schedule_equals_denoising_with_both_prompts(
    name: str, reducer: tr.Reducer, from_step: int
) -> None:
    case = FAMILIES[name]()
    expected = denoised(case, reducer, from_step)
    with tr.attach(case.model, schedule(reducer, from_step)) as run:
        generate(case).check(expected, TOLERANCE)
        receipt = run.receipt
    early, late = receipt.steps
    assert (early.first, early.passes) == (0, BLOCKS * from_step)
    assert (late.first, late.passes) == (from_step, BLOCKS * (STEPS - from_step))
    assert (early.tokens, late.tokens) == (32, receipt.tokens_out)
    assert receipt.tokens_out < 32
    assert receipt.kv_bytes_saved < 0
    assert receipt.as_dict()["steps"][1]["passes"] == late.passes
    assert f"from denoising step {from_step} on {receipt.tokens_out}" in str(receipt)
    assert f"at projector from step {from_step}" in str(receipt)
    assert "MiB larger" in str(receipt)


def test_a_schedule_that_the_answer_never_reaches_changes_nothing_and_says_so() -> None:
    case = denoising_reference.case()
    expected = generate(case)
    with tr.attach(case.model, schedule(UnevenRandom(), STEPS)) as run:
        generate(case).check(expected, tolerance=0)
        assert [steps.passes for steps in run.receipt.steps] == [BLOCKS * STEPS, 0]


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("window", [8, 12])
def test_beyond_the_sliding_window(window: int, both_ways: bool) -> None:
    # The window counts tokens of the sequence that is read, as the cache that keeps its last ones.
    case = denoising_reference.case(window=window, both_ways=both_ways)
    for reducer, from_step in ((UnevenRandom(), 0), (EveryOther(reduction=3), 2)):
        expected = denoised(case, reducer, from_step)
        with tr.attach(case.model, schedule(reducer, from_step) if from_step else reducer):
            generate(case).check(expected, TOLERANCE)


def expected_forward(case: Case, reducer: tr.Reducer) -> torch.Tensor:
    # Outside of generate the encoder builds no masks for images.
    case, length = replace(case, further=None), case.inputs["input_ids"].shape[1]
    nothing = torch.zeros(2, 0, dtype=torch.long)
    steps = []
    for prompt in reference.reduced_prompts(case, reducer):
        cache = denoising_reference.encoded(case, prompt, length, nothing)
        steps.append(denoising_reference.read(case, prompt, cache, length, canvas(), None))
    return torch.cat(steps)


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_equals_an_independent_recomputation(name: str, side: str) -> None:
    case, reducer = FAMILIES[name](side), UnevenRandom()
    expected, whole = expected_forward(case, reducer), forward(case)
    with tr.attach(case.model, reducer):
        assert (forward(case) - expected).abs().max() < TOLERANCE
    with tr.attach(case.model, schedule(reducer, 1)) as run:
        assert torch.equal(forward(case), whole)
        assert [steps.passes for steps in run.receipt.steps] == [1, 0]
    support_matrix.proved(name, "forward")


@pytest.mark.parametrize("from_step", [0, 1])
def test_a_loop_of_ones_own_counts_its_steps(from_step: int) -> None:
    case, reducer = denoising_reference.case(), UnevenRandom()
    expected, whole = expected_forward(case, reducer), forward(case)
    ids = {"decoder_input_ids": canvas()}
    mask = torch.nn.functional.pad(case.inputs["attention_mask"], (0, CANVAS), value=1)
    with (
        tr.attach(case.model, schedule(reducer, from_step) if from_step else reducer),
        torch.no_grad(),
    ):
        first = case.model(**case.batch(), **ids, decoder_attention_mask=mask)
        cache = first.past_key_values
        assert cache.get_seq_length() == case.inputs["input_ids"].shape[1]
        second = case.model(past_key_values=cache, **ids, decoder_attention_mask=mask)
    assert (first.logits - (whole if from_step else expected)).abs().max() < TOLERANCE
    assert (second.logits - expected).abs().max() < TOLERANCE


def test_features_that_were_encoded_before_are_reduced() -> None:
    case, reducer = denoising_reference.case(), UnevenRandom()
    inputs = case.batch()
    visual = {key: inputs.pop(key) for key in ("pixel_values", "image_position_ids")}
    with tr.attach(case.model, reducer) as run, torch.no_grad():
        expected = case.model(**case.batch(), decoder_input_ids=canvas()).logits
        encoded = case.model.model.encoder.get_image_features(**visual, return_dict=True)
        again = case.model(
            **inputs, mm_encoder_outputs={"image": encoded}, decoder_input_ids=canvas()
        )
        assert torch.equal(again.logits, expected)
        assert run.receipt.tokens_out < 32


@every_family
@pytest.mark.parametrize("from_step", [0, 2])
def test_a_static_cache_gives_the_same(name: str, from_step: int) -> None:
    case, reducer = FAMILIES[name](), UnevenRandom()
    expected = denoised(case, reducer, from_step)
    with tr.attach(case.model, schedule(reducer, from_step) if from_step else reducer):
        generate(case, **STATIC).check(expected, TOLERANCE)
        generate(case, **STATIC).check(expected, TOLERANCE)
    support_matrix.proved(name, "static cache")


def second_turn(case: Case) -> tuple[Any, torch.Tensor]:
    """A second turn on the cache of a first, and what was said before it."""
    length = case.inputs["input_ids"].shape[1]
    torch.manual_seed(3)
    first = case.model.generate(**case.batch(), max_new_tokens=BLOCKS * CANVAS)
    more = torch.tensor([words(4, 11), words(4, 12)])
    said = torch.cat([first.sequences[:, length:], more], 1)
    turn = Case(
        case.model,
        {
            # The last block was never read by the encoder.
            "input_ids": said[:, -CANVAS - 4 :],
            "attention_mask": torch.nn.functional.pad(
                case.inputs["attention_mask"], (0, said.shape[1]), value=1
            ),
        },
        (),
    )
    return generate(turn, past_key_values=copy.deepcopy(first.past_key_values)), said


@every_family
@pytest.mark.parametrize("from_step", [0, 2])
def test_a_second_turn_continues_the_kept_cache(name: str, from_step: int) -> None:
    case, reducer = FAMILIES[name](), UnevenRandom()
    answer, said = second_turn(case)
    answer.check(denoised(case, KEEP_ALL, said=said), TOLERANCE)
    with tr.attach(case.model, schedule(reducer, from_step) if from_step else reducer) as run:
        answer, said = second_turn(case)
        assert run.receipt.tokens_in == 32
    answer.check(denoised(case, reducer, from_step, said), TOLERANCE)
    support_matrix.proved(name, "multi-turn")


@every_family
def test_detach_leaves_no_trace(name: str) -> None:
    case = FAMILIES[name]()
    before = forward(case)
    trace = anatomy(case.model)
    weights = {key: value.clone() for key, value in case.model.state_dict().items()}
    for reducer in (UnevenRandom(), schedule(UnevenRandom(), 2)):
        run = tr.attach(case.model, reducer)
        support_matrix.describe(name, case, run)
        generate(case)
        run.detach()
        assert anatomy(case.model) == trace
        assert all(torch.equal(case.model.state_dict()[key], weights[key]) for key in weights)
        assert torch.equal(forward(case), before)
    support_matrix.stock_cannot(name, "beams")


def test_the_same_without_a_head() -> None:
    case = denoising_reference.case()
    with tr.attach(case.model.model, UnevenRandom()) as run, torch.no_grad():
        reduced = case.model.model(**case.batch(), decoder_input_ids=canvas())
        assert run.receipt.tokens_out < 32
    with tr.attach(case.model, UnevenRandom()), torch.no_grad():
        logits = case.model(**case.batch(), decoder_input_ids=canvas()).logits
    head = case.model.lm_head(reduced.last_hidden_state)
    assert torch.equal(30 * torch.tanh(head / 30), logits)


def test_a_disabled_schedule_keeps_all() -> None:
    case = denoising_reference.case()
    expected = generate(case)
    with tr.attach(case.model, schedule(UnevenRandom(), 2)) as run:
        with run.disabled():
            generate(case).check(expected, tolerance=0)
            assert run.receipt.steps == ()
            assert run.receipt.reason == "the attachment is disabled"
        generate(case)
        assert run.receipt.steps


def test_a_prompt_without_an_image() -> None:
    case = denoising_reference.case()
    text = replace(case, inputs={"input_ids": torch.tensor([words(9, 1)] * 2)})
    expected = generate(text)
    with tr.attach(case.model, schedule(UnevenRandom(), 2)) as run:
        generate(case)
        generate(text).check(expected, tolerance=0)
        assert run.receipt.reason == "a text-only turn"
        assert run.receipt.steps == ()


def test_budgets_of_a_schedule() -> None:
    case = denoising_reference.case()
    reducer = schedule(tr.create_strategy("norm-topk"), 2)
    with pytest.raises(BudgetError, match="no budget"):
        tr.attach(case.model, reducer)
    with tr.attach(case.model, reducer.with_budget(keep=4)) as run:
        generate(case)
        assert run.receipt.tokens_out == 8
        with run.budget(keep=2):
            generate(case)
            assert run.receipt.tokens_out == 4


# -- refused ---------------------------------------------------------------------------------------


def test_models_without_denoising_steps_refuse_a_schedule() -> None:
    with pytest.raises(UnsupportedModel, match=r"not a diffusion model.*Use 'UnevenRandom' alone"):
        tr.attach(llava().model, schedule(UnevenRandom(), 2))


@pytest.mark.parametrize(
    ("pipeline", "error", "message"),
    [
        (
            tr.Stage(reducer=UnevenRandom(), site="decoder", layer=1),
            UnsupportedSite,
            "served at: projector",
        ),
        ([UnevenRandom(), schedule(UnevenRandom(), 2)], PipelineError, "one from_step"),
        (
            tr.Stage(reducer=tr.create_strategy("norm-topk"), flops=1e9),
            BudgetError,
            "not known beforehand",
        ),
    ],
    ids=["decoder site", "two schedules", "flops"],
)
def test_what_cannot_be_served_is_refused(
    pipeline: tr.attachment.Reducible, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tr.attach(denoising_reference.case().model, pipeline)


def test_its_cost_is_not_counted() -> None:
    with pytest.raises(UnsupportedModel, match="no LLM that runs by itself"):
        language_model_cost(denoising_reference.case().model)


def test_a_part_of_the_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="attach to the whole of it"):
        tr.attach(denoising_reference.case().model.model.encoder, UnevenRandom())


def test_compiled_denoising_is_refused() -> None:
    case = denoising_reference.case()
    with (
        tr.attach(case.model, UnevenRandom()),
        pytest.raises(UnsupportedGeneration, match="disable_compile=True"),
    ):
        generate(case, cache_implementation="static")


def test_a_cache_whose_two_sequences_disagree_is_refused() -> None:
    case = denoising_reference.case()
    with tr.attach(case.model, schedule(UnevenRandom(), 2)), torch.no_grad():
        cache = case.model(**case.batch(), decoder_input_ids=canvas()).past_key_values
        cropped = copy.deepcopy(cache)
        cropped.crop(-1)
        with pytest.raises(AttachmentError, match="do not agree"):
            case.model(decoder_input_ids=canvas(), past_key_values=cropped)
    with tr.attach(case.model, UnevenRandom()), torch.no_grad():
        more = {"input_ids": torch.tensor([words(4, 11)] * 2), "decoder_input_ids": canvas()}
        with pytest.raises(AttachmentError, match="by another pipeline"):
            case.model(**more, past_key_values=cache)
        reduced = case.model(**case.batch(), decoder_input_ids=canvas()).past_key_values
    with tr.attach(case.model, schedule(UnevenRandom(), 2)), torch.no_grad():
        again = {**case.batch(), "attention_mask": None, "decoder_input_ids": canvas()}
        with pytest.raises(AttachmentError, match="by another pipeline"):
            case.model(**again, past_key_values=reduced)


@support_matrix.of_this_release
def test_the_matrix_shows_what_was_proved() -> None:
    support_matrix.check()
