"""Every family of multimodal models: the attachment against the unmodified model and an independent
recomputation. What is proved here is the support matrix of the documentation."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers

import tokenreduce as tr
from support import masked_reference, reference, support_matrix
from support.reducers import EveryOther, UnevenRandom
from support.tiny_families import TINY
from support.tiny_models import CASES, Case, words
from support.traces import anatomy
from tokenreduce.errors import UnsupportedGeneration, UnsupportedModel, UnsupportedSite
from tokenreduce_integrations.transformers.unsupported import REASONS

STEPS = 3
ANSWER = [2, 30, 31]
# Recurrent layers add up their steps in another order in chunks than one by one.
TOLERANCE = 5e-5

FAMILIES: dict[str, Callable[..., Case]] = {
    **{name: case for name, case in CASES.items() if name != "llava-several-images"},
    **{name: tiny.case for name, tiny in TINY.items() if tiny.in_this_release},
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def generate(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids ``(B, steps)`` and their logits ``(steps, B, V)``."""
    with torch.no_grad():
        result = case.model.generate(
            **case.batch(),
            **{"do_sample": False, "max_new_tokens": STEPS, **options},
            return_dict_in_generate=True,
            output_logits=True,
        )
    return result.sequences[:, -STEPS:], torch.stack(result.logits)


def forward(case: Case) -> torch.Tensor:
    answer = {} if case.seq2seq is None else {"decoder_input_ids": torch.tensor([ANSWER, ANSWER])}
    with torch.no_grad():
        return case.model(**case.batch(), **answer).logits


@every_family
def test_keep_all_is_bit_identical(name: str) -> None:
    case = FAMILIES[name]()
    before, (ids, logits) = forward(case), generate(case)
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep_ratio=1.0)) as run:
        assert torch.equal(forward(case), before)
        attached_ids, attached_logits = generate(case)
        assert torch.equal(attached_ids, ids)
        assert torch.equal(attached_logits, logits)
        assert run.receipt.ratio == 1.0


@every_family
@pytest.mark.parametrize(
    "reducer", [UnevenRandom(), EveryOther(reduction=3)], ids=["drop", "merge"]
)
def test_generation_equals_an_independent_recomputation(name: str, reducer: tr.Reducer) -> None:
    case = FAMILIES[name]()
    expected_ids, expected_logits = reference.greedy(case, reducer, STEPS)
    with tr.attach(case.model, reducer) as run:
        ids, logits = generate(case)
        assert [item.tokens_in for item in run.receipt.items] == [
            len(item.coords) for item in case.items
        ]
        assert run.receipt.tokens_out < run.receipt.tokens_in
        for found, item in zip(run.reductions, case.items, strict=True):
            assert torch.equal(found.layout.coords, torch.tensor(item.coords))
        modalities = {found.modality for found in run.reductions}
    assert torch.equal(ids, expected_ids)
    assert (logits - expected_logits).abs().max() < TOLERANCE
    for modality in modalities:
        support_matrix.proved(name, modality)
    support_matrix.proved(name, "generate")
    support_matrix.proved(name, "batch")


@every_family
def test_receipts_have_the_bytes_that_the_cache_takes(name: str) -> None:
    case = FAMILIES[name]()
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep_ratio=1.0)) as run:
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "do_sample": False}
        with torch.no_grad():
            cache = case.model.generate(**case.batch(), **options).past_key_values
    # Of an encoder and a decoder, the decoder holds what it attends to of the encoder.
    cache = cache if case.seq2seq is None else cache.cross_attention_cache
    total = 0
    for layer in cache.layers:
        for kind in ("keys", "values"):
            states = getattr(layer, f"prefill_{kind}", None)
            states = getattr(layer, kind, None) if states is None else states
            if isinstance(states, torch.Tensor):
                total += states.numel() * states.element_size()
    batch, length = case.inputs["input_ids"].shape
    assert run.receipt.kv_bytes_per_token * batch * length == total


@every_family
def test_forward_equals_an_independent_recomputation(name: str) -> None:
    # positions of a right-padded forward begin at zero in each row, as those of generate do
    case = FAMILIES[name]("right")
    reducer = UnevenRandom()
    prompts = reference.reduced_prompts(case, reducer)
    with tr.attach(case.model, reducer):
        logits = forward(case)
    for prompt in prompts:
        if case.seq2seq is not None:
            with torch.no_grad():
                expected = reference.seq2seq_logits(case, prompt, ANSWER)
            assert (logits[prompt.row] - expected).abs().max() < TOLERANCE
            continue
        assert logits.shape[:2] == case.inputs["input_ids"].shape
        hidden = reference.hidden_states(case, prompt, prompt.embeds, prompt.positions)
        expected = reference.logits_of(case, hidden)[0]
        assert (logits[prompt.row, prompt.columns] - expected).abs().max() < TOLERANCE
    support_matrix.proved(name, "forward")


@every_family
def test_beams_equal_an_independent_search(name: str) -> None:
    case = FAMILIES[name]()
    if not stock_can(lambda: generate(case, num_beams=2)):
        support_matrix.stock_cannot(name, "beams")
        return
    reducer = UnevenRandom()
    expected = reference.beams(case, reducer, STEPS, width=2)
    with tr.attach(case.model, reducer):
        ids = generate(case, num_beams=2)[0]
    assert torch.equal(ids, expected)
    support_matrix.proved(name, "beams")


@every_family
def test_a_static_cache_gives_the_same(name: str) -> None:
    case = FAMILIES[name]()
    static = {"cache_implementation": "static", "disable_compile": True}
    if not stock_can(lambda: check_static(case, generate(case), **static)):
        support_matrix.stock_cannot(name, "static cache")
        return
    reducer = UnevenRandom()
    expected = reference.greedy(case, reducer, STEPS)
    with tr.attach(case.model, reducer):
        check_static(case, expected, **static)
    support_matrix.proved(name, "static cache")


def check_static(case: Case, expected: tuple[torch.Tensor, torch.Tensor], **static: Any) -> None:
    ids, logits = generate(case, **static)
    assert torch.equal(ids, expected[0])
    assert (logits - expected[1]).abs().max() < TOLERANCE


@every_family
def test_a_second_turn_continues_the_kept_cache(name: str) -> None:
    case = FAMILIES[name]()
    if case.seq2seq is not None:
        # An encoder-decoder has no cache of its prompt to continue.
        support_matrix.stock_cannot(name, "multi-turn")
        return
    # What the unmodified model says in a second turn, against the whole conversation at once.
    if not stock_can(lambda: check_second_turn(case, generate)):
        support_matrix.stock_cannot(name, "multi-turn")
        return
    reducer = UnevenRandom()
    with tr.attach(case.model, reducer) as run:

        def expected(whole: Case) -> tuple[torch.Tensor, torch.Tensor]:
            with run.disabled():
                return reference.greedy(whole, reducer, STEPS)

        check_second_turn(case, expected)
    support_matrix.proved(name, "multi-turn")


def check_second_turn(
    case: Case, expected: Callable[[Case], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """A second turn on the cache of a first says what ``expected`` says of the whole."""
    options = {
        "do_sample": False,
        "max_new_tokens": STEPS,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with torch.no_grad():
        first = case.model.generate(**case.batch(), **options)
        more = torch.tensor([words(4, 11), words(4, 12)])
        ids = torch.cat([first.sequences, more], 1)
        grown = ids.shape[1] - case.inputs["input_ids"].shape[1]
        text = {
            key: torch.nn.functional.pad(value, (0, grown), value=int(key == "attention_mask"))
            for key, value in case.inputs.items()
            if key in ("attention_mask", "token_type_ids", "mm_token_type_ids")
        }
        second = case.model.generate(
            input_ids=ids, past_key_values=first.past_key_values, **text, **options
        )
    whole = replace(case, inputs={**case.inputs, **text, "input_ids": ids})
    expected_ids, expected_logits = expected(whole)
    assert torch.equal(second.sequences[:, -STEPS:], expected_ids)
    assert (torch.stack(second.logits) - expected_logits).abs().max() < TOLERANCE


def stock_can(attempt: Callable[[], object]) -> bool:
    """Whether the unmodified model does it at all, and consistently."""
    try:
        attempt()
    except Exception:  # noqa: BLE001 (whatever a model raises, it cannot)
        return False
    return True


@every_family
def test_detach_leaves_no_trace(name: str) -> None:
    case = FAMILIES[name]()
    before = forward(case)
    trace, weights = anatomy(case.model), case.model.state_dict()
    weights = {key: value.clone() for key, value in weights.items()}
    run = tr.attach(case.model, UnevenRandom())
    support_matrix.describe(name, case, run)
    generate(case)
    run.detach()
    assert anatomy(case.model) == trace
    assert all(torch.equal(case.model.state_dict()[key], weights[key]) for key in weights)
    assert torch.equal(forward(case), before)


@pytest.mark.parametrize("qualified", REASONS)
def test_what_cannot_be_served_is_refused_with_the_reason(qualified: str) -> None:
    module, _, name = qualified.rpartition(".")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    model = kind.__new__(kind)
    torch.nn.Module.__init__(model)
    with pytest.raises(UnsupportedModel) as refusal:
        tr.attach(model, UnevenRandom())
    assert REASONS[qualified] in str(refusal.value)
    support_matrix.refused(name.removesuffix("PreTrainedModel"), REASONS[qualified])


def test_models_of_sound_alone_are_refused() -> None:
    config = transformers.VoxtralConfig(
        audio_config={"num_hidden_layers": 1},
        text_config={"model_type": "llama", "num_hidden_layers": 1},
    )
    with torch.device("meta"):
        model = transformers.VoxtralForConditionalGeneration(config)
    with pytest.raises(UnsupportedModel, match="neither images nor video"):
        tr.attach(model, UnevenRandom())


@pytest.mark.parametrize("window", [4, 8, 16, 64])
def test_gemma3_within_and_beyond_its_sliding_window(window: int) -> None:
    # The window counts tokens of the shorter sequence, as the cache that keeps its last ones does.
    tiny = TINY["gemma3"]
    text = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"] * 2}
    case = replace(tiny, changes={**tiny.changes, "text_config": text}).case()
    for reducer in (UnevenRandom(), EveryOther(reduction=3)):
        expected_ids, expected_logits = reference.greedy(case, reducer, 8)
        with tr.attach(case.model, reducer):
            ids, logits = generate(case, max_new_tokens=8)
        assert torch.equal(ids, expected_ids[:, -STEPS:])
        assert (logits - expected_logits).abs().max() < TOLERANCE


def test_a_second_turn_of_qwen2_5_vl_with_video_keeps_the_positions_of_the_unmodified_model() -> (
    None
):
    # The model places a second turn after a video elsewhere than it would within one prompt. Where
    # it does is what a reduced second turn is given.
    case = FAMILIES["qwen2.5-vl"]()
    seen: list[torch.Tensor] = []

    def note(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_ids"])

    def second_turn() -> torch.Tensor:
        with torch.no_grad():
            first = case.model(**case.batch(), use_cache=True)
            more = torch.tensor([words(4, 11), words(4, 12)])
            case.model(input_ids=more, past_key_values=first.past_key_values)
        return seen[-1]

    handle = case.model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    stock = second_turn()
    handle.remove()
    with tr.attach(case.model, UnevenRandom()):
        handle = case.model.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
        assert torch.equal(second_turn(), stock)
        handle.remove()


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2.5-vl", "idefics3"])
def test_a_prompt_split_inside_an_image_is_refused(name: str) -> None:
    case = FAMILIES[name]()
    with (
        tr.attach(case.model, UnevenRandom()),
        pytest.raises(UnsupportedGeneration, match="prefill_chunk_size"),
    ):
        generate(case, prefill_chunk_size=8)


@dataclass(frozen=True, kw_only=True)
class Loudest(tr.Scorer):
    """Keeps hidden states of largest norm."""

    def score(self, tokens: tr.VisualTokens) -> torch.Tensor:
        return tokens.features.float().norm(dim=-1)


@every_family
def test_stages_between_the_layers_equal_masking_what_they_drop(name: str) -> None:
    case, padded = FAMILIES[name]("right"), FAMILIES[name]("left")
    plain = generate(padded)
    stage = tr.Stage(reducer=Loudest(), site="decoder", schedule={1: 0.5})
    try:
        run = tr.attach(case.model, stage)
    except UnsupportedSite:
        return
    logits = forward(case)
    assert run.receipt.tokens_out < run.receipt.tokens_in
    kept = case.inputs["attention_mask"].bool().clone()
    for item in run.reductions:
        kept[item.prompt, item.columns] = False
        kept[item.prompt, item.columns[item.kept]] = True
    run.detach()
    dropped = case.inputs["attention_mask"].bool() & ~kept
    expected = masked_reference.masked_logits(case, run.decoder, 1, dropped)
    assert (logits - expected)[kept].abs().max() < TOLERANCE
    with tr.attach(padded.model, stage):
        ids, steps = generate(padded)
        assert not torch.equal(steps, plain[1])
        if stock_can(lambda: generate(padded, use_cache=False)):
            assert torch.equal(generate(padded, use_cache=False)[0], ids)
    # Keeping all, the model is called as it would be alone.
    with tr.attach(padded.model, replace(stage, schedule={1: 1.0})):
        assert all(torch.equal(*pair) for pair in zip(generate(padded), plain, strict=True))
    support_matrix.proved(name, "decoder site")


@support_matrix.of_this_release
def test_the_matrix_shows_what_was_proved() -> None:
    support_matrix.check()
