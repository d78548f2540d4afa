"""The attachment against the unmodified model and an independent recomputation."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import tokenreduce as tr
from support import needy, reference
from support.reducers import Chooses, EveryOther, KeepsAll, UnevenRandom
from support.tiny_models import (
    BOS,
    CASES,
    CLIP,
    IMAGE,
    PAD,
    TEXT,
    VIDEO,
    Case,
    enable_checkpointing,
    lively,
    llava,
    words,
)
from tokenreduce.errors import (
    AttachmentError,
    BudgetError,
    MediaError,
    MissingSignal,
    StageNotEngaged,
    TokensError,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce.plugins import installed

STEPS = 6


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def generate(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids ``(B, steps)`` and their logits ``(steps, B, V)``."""
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        result = case.model.generate(
            **case.batch(), **options, return_dict_in_generate=True, output_logits=True
        )
    return result.sequences[:, case.inputs["input_ids"].shape[1] :], torch.stack(result.logits)


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


REDUCERS = {
    "uneven-random": UnevenRandom(),
    "norm-topk": tr.create_strategy("norm-topk", keep_ratio=0.3),
    "merging": EveryOther(reduction=3),
    "chain": tr.chain(EveryOther(reduction=2), tr.create_strategy("norm-topk", keep=3)),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_keep_all_is_bit_identical(name: str, side: str) -> None:
    case = CASES[name](side)
    before = logits(case)
    ids, steps = generate(case)
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep_ratio=1.0)) as run:
        assert torch.equal(logits(case), before)
        attached_ids, attached_steps = generate(case)
        assert torch.equal(attached_ids, ids)
        assert torch.equal(attached_steps, steps)
        assert run.receipt.ratio == 1.0
        assert "within the budget" in run.receipt.reason


@pytest.mark.parametrize("reducer", REDUCERS)
def test_generation_equals_an_independent_recomputation(case: Case, reducer: str) -> None:
    strategy = REDUCERS[reducer]
    expected_ids, expected_logits = reference.greedy(case, strategy, STEPS)
    unreduced = generate(case)[1]
    with tr.attach(case.model, strategy) as run:
        ids, steps = generate(case)
        assert torch.equal(ids, expected_ids)
        assert (steps - expected_logits).abs().max() < 1e-5
        assert not torch.allclose(steps[0], unreduced[0], atol=1e-3)
        assert run.receipt.tokens_out < run.receipt.tokens_in
        assert torch.equal(generate(case, use_cache=False)[0], expected_ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_forward_logits_and_loss_are_those_of_the_shorter_sequence(name: str, side: str) -> None:
    case = CASES[name](side)
    reducer = UnevenRandom()
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"].bool()
    # Nothing predicts the first token of a prompt; under left padding the stock loss would take
    # the padding before it for a prediction.
    labels = ids.masked_fill(~mask | (ids == IMAGE) | (ids == VIDEO) | (ids == BOS), -100)
    # positions of a right-padded forward begin at zero in each row, as those of generate do
    prompts = reference.reduced_prompts(case, reducer)
    with tr.attach(case.model, reducer), torch.no_grad():
        batch = case.batch()
        if side == "left" and name.startswith("qwen") is False:
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        out = case.model(**batch, labels=labels)
    assert out.logits.shape[:2] == ids.shape
    head = case.model.get_output_embeddings()
    losses = []
    for row, prompt in enumerate(prompts):
        hidden = reference.hidden_states(case, prompt, prompt.embeds, prompt.positions)
        expected = head(hidden)[0]
        assert (out.logits[row, prompt.columns] - expected).abs().max() < 1e-5
        target = labels[row, prompt.columns][1:]
        losses.append(
            torch.nn.functional.cross_entropy(expected[:-1], target, reduction="none")[
                target != -100
            ]
        )
    assert torch.allclose(out.loss, torch.cat(losses).mean(), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen3-vl"])
def test_beams_equal_those_over_the_shorter_embeddings(name: str) -> None:
    # DeepStack features cannot be passed to generate, so there is nothing to compare Qwen3-VL with.
    case = CASES[name]()
    reducer = UnevenRandom()
    prompts = reference.reduced_prompts(case, reducer)

    def alone(row: int, **options: Any) -> torch.Tensor:
        prompt = prompts[row]
        with torch.no_grad():
            return case.model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=torch.ones(prompt.embeds.shape[:2], dtype=torch.long),
                position_ids=prompt.positions,
                max_new_tokens=STEPS,
                **options,
            )[0]

    beams = [alone(row, do_sample=False, num_beams=3) for row in range(len(prompts))]
    with tr.attach(case.model, reducer):
        attached = generate(case, num_beams=3)[0]
    for row, expected in enumerate(beams):
        assert torch.equal(attached[row], expected)


def test_sampling_is_that_over_the_shorter_embeddings() -> None:
    case = llava()
    single = Case(
        case.model,
        {name: value[:1] for name, value in case.inputs.items()},
        case.items[:1],
    )
    reducer = UnevenRandom()
    prompt = reference.reduced_prompts(single, reducer)[0]
    options = {"do_sample": True, "top_k": 20, "max_new_tokens": STEPS}
    torch.manual_seed(0)
    with torch.no_grad():
        expected = single.model.generate(
            inputs_embeds=prompt.embeds, position_ids=prompt.positions, **options
        )
    torch.manual_seed(0)
    with tr.attach(single.model, reducer):
        assert torch.equal(generate(single, **options)[0], expected)


def test_interleaved_caches_do_not_disturb_one_another() -> None:
    case = llava()
    model = case.model
    reducer = UnevenRandom()
    expected = reference.greedy(case, reducer, STEPS)[0]
    rows = []
    with tr.attach(model, reducer), torch.no_grad():
        for row in range(2):
            real = case.inputs["attention_mask"][row].bool()
            rows.append(
                {
                    "cache": DynamicCache(config=model.config.get_text_config()),
                    "next": {
                        "input_ids": case.inputs["input_ids"][row : row + 1, real],
                        "pixel_values": case.inputs["pixel_values"][row : row + 1],
                    },
                    "ids": [],
                }
            )
        for _ in range(STEPS):
            for row in rows:
                out = model(**row["next"], past_key_values=row["cache"])
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                row["ids"].append(int(token))
                row["next"] = {"input_ids": token}
    assert [row["ids"] for row in rows] == expected.tolist()


def test_a_second_turn_continues_the_kept_cache() -> None:
    case = llava()
    single = Case(
        case.model, {name: value[:1] for name, value in case.inputs.items()}, case.items[:1]
    )
    more = torch.tensor([words(4, 11)])
    whole = dict(single.inputs)
    whole["input_ids"] = torch.cat([single.inputs["input_ids"], more], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    reducer = UnevenRandom()
    expected = reference.greedy(Case(case.model, whole, case.items[:1]), reducer, 1)[1][0]
    with tr.attach(case.model, reducer), torch.no_grad():
        first = case.model(**single.batch(), use_cache=True)
        assert first.past_key_values.get_seq_length() == single.inputs["input_ids"].shape[1]
        second = case.model(input_ids=more, past_key_values=first.past_key_values)
    assert (second.logits[:, -1] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_static_cache_and_prompt_lookup(name: str) -> None:
    case = CASES[name]()
    reducer = UnevenRandom()
    expected = reference.greedy(case, reducer, STEPS)[0]
    with tr.attach(case.model, reducer):
        assert torch.equal(
            generate(case, cache_implementation="static", disable_compile=True)[0], expected
        )
    single = Case(
        case.model,
        {key: value[:1] if value.shape[0] == 2 else value for key, value in llava().inputs.items()},
        llava().items[:1],
    )
    if name == "llava":
        alone = reference.greedy(single, reducer, STEPS)[0]
        with tr.attach(case.model, reducer):
            assert torch.equal(generate(single, prompt_lookup_num_tokens=3)[0], alone)


def test_gradients_flow_and_checkpointing_gives_the_same() -> None:
    case = llava("right")
    model = case.model.train()
    labels = case.inputs["input_ids"].masked_fill(case.inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(case.inputs["attention_mask"] == 0, -100)

    def gradients() -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loss = model(**case.batch(), labels=labels).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with tr.attach(model, EveryOther(reduction=4)):
        loss, plain = gradients()
        enable_checkpointing(model)
        again, checkpointed = gradients()
    assert loss == pytest.approx(again, abs=1e-6)
    assert len(plain) == len(checkpointed)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, checkpointed, strict=True))
    assert any(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in model.model.vision_tower.parameters()
    )


# -- caches ---------------------------------------------------------------------------------------


def continued(model: Any, cache: Any, rows: int) -> torch.Tensor:
    """Logits of one more token for each row."""
    token = torch.tensor([[30 + row] for row in range(rows)])
    with torch.no_grad():
        return model(input_ids=token, past_key_values=cache).logits[:, -1]


def prefilled(case: Case) -> Any:
    with torch.no_grad():
        return case.model(**case.batch(), use_cache=True).past_key_values


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
def test_a_reduced_cache_can_be_copied(name: str, duplicate: Any) -> None:
    case = CASES[name]()
    with tr.attach(case.model, UnevenRandom()):
        cache = prefilled(case)
        twin = duplicate(cache)
        expected = continued(case.model, cache, 2)
        length = twin.get_seq_length()
        assert length == case.inputs["input_ids"].shape[1]
        assert torch.equal(continued(case.model, twin, 2), expected)
        assert twin.get_seq_length() == length + 1


def test_the_ledger_follows_the_rows_of_a_cache() -> None:
    case = llava()
    with tr.attach(case.model, UnevenRandom()):
        expected = continued(case.model, prefilled(case), 2)
        token = torch.tensor([[31], [30]])
        swapped = prefilled(case)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        with torch.no_grad():
            logits = case.model(input_ids=token, past_key_values=swapped).logits[:, -1]
        assert torch.allclose(logits.flip(0), expected, atol=1e-5)
        one = prefilled(case)
        one.batch_select_indices(torch.tensor([1]))
        with torch.no_grad():
            logits = case.model(input_ids=token[:1], past_key_values=one).logits[:, -1]
        assert torch.allclose(logits[0], expected[1], atol=1e-5)
        twice = prefilled(case)
        twice.batch_repeat_interleave(2)
        with torch.no_grad():
            four = torch.tensor([[30], [30], [31], [31]])
            logits = case.model(input_ids=four, past_key_values=twice).logits[:, -1]
        assert torch.allclose(logits[::2], expected, atol=1e-5)
        with pytest.raises(AttachmentError, match="holds 2 prompts"):
            continued(case.model, prefilled(case), 1)


def test_an_emptied_cache_starts_anew() -> None:
    case = llava()
    plain = generate(case)[0]
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=64)
    options = {"past_key_values": cache, "disable_compile": True}
    with tr.attach(case.model, UnevenRandom()):
        expected = generate(case, **options)[0]
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(case, **options)[0], expected)
    cache.reset()
    assert torch.equal(generate(case, **options)[0], plain)


def test_a_reduced_cache_is_refused_after_detaching() -> None:
    case = llava()
    with tr.attach(case.model, UnevenRandom()):
        cache = prefilled(case)
    with pytest.raises(AttachmentError, match="continue it while"):
        continued(case.model, cache, 2)


@pytest.mark.parametrize("window", [8, 24, 64])
def test_a_static_cache_with_a_sliding_window(window: int) -> None:
    case = llava()
    text = {"model_type": "mistral", "sliding_window": window, "head_dim": 16, **TEXT}
    config = transformers.LlavaConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    model = lively(transformers.LlavaForConditionalGeneration(config))
    case = Case(model, case.inputs, case.items)
    reducer = UnevenRandom()
    expected = reference.greedy(case, reducer, STEPS)[0]
    with tr.attach(model, reducer):
        assert torch.equal(generate(case)[0], expected)
        static = {"cache_implementation": "static", "disable_compile": True}
        if window < case.inputs["input_ids"].shape[1]:
            with pytest.raises(UnsupportedModel, match="sliding window"):
                generate(case, **static)
        else:
            assert torch.equal(generate(case, **static)[0], expected)


def test_threads_may_share_a_model() -> None:
    case = CASES["llava-several-images"]()
    other = llava()
    shared = Case(case.model, other.inputs, other.items)
    with tr.attach(case.model, UnevenRandom()):
        expected = [generate(case)[0], generate(shared)[0]]
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(generate, each) for _ in range(4) for each in (case, shared)]
            for index, job in enumerate(jobs):
                assert torch.equal(job.result()[0], expected[index % 2])


def test_a_compiled_model_gives_the_same() -> None:
    case = llava()
    reducer = UnevenRandom()
    expected = logits_while(case, reducer)
    compiled = torch.compile(case.model, backend="eager")
    with tr.attach(compiled, reducer), torch.no_grad():
        assert torch.allclose(compiled(**case.batch()).logits, expected, atol=1e-5)
    torch.compiler.reset()


def logits_while(case: Case, reducer: tr.Reducer) -> torch.Tensor:
    with tr.attach(case.model, reducer):
        return logits(case)


# -- no trace ------------------------------------------------------------------------------------


def anatomy(model: Any) -> dict[str, Any]:
    """Everything an attachment could leave behind, of every module."""
    trace: dict[str, Any] = {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict(),
    }
    for name, module in model.named_modules():
        plain = {
            key: (
                id(value) if not isinstance(value, dict) else {k: id(v) for k, v in value.items()}
            )
            for key, value in vars(module).items()
        }
        trace[name] = (type(module), plain, id(module.forward.__func__))
    return trace


def test_detach_leaves_no_trace_and_a_second_attach_works(case: Case) -> None:
    model = case.model
    reducer = UnevenRandom()
    expected = reference.greedy(case, reducer, STEPS)[0]
    reference_logits = logits(case)
    before = anatomy(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        run = tr.attach(model, reducer)
        assert torch.equal(generate(case)[0], expected)
        run.detach()
        run.detach()
        after = anatomy(model)
        if "rope_deltas" in vars(model.model):
            # the stock model itself remembers the offset of its latest prompt
            del before["model"][1]["rope_deltas"], after["model"][1]["rope_deltas"]
            before["model"][1]["rope_deltas"] = after["model"][1]["rope_deltas"] = None
        assert after == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(case), reference_logits)


def test_an_error_inside_the_model_leaves_it_clean() -> None:
    case = llava()
    before = logits(case)
    batch = case.batch()
    batch["pixel_values"][0, 0, 0, 0] = float("nan")
    with tr.attach(case.model, UnevenRandom()), pytest.raises(TokensError, match="NaN"):
        case.model(**batch)
    assert torch.equal(logits(case), before)
    with tr.attach(case.model, UnevenRandom()):
        assert generate(case)[0].shape == (2, STEPS)


def test_a_copy_made_while_attached_is_refused() -> None:
    case = llava()
    with tr.attach(case.model, UnevenRandom()), pytest.raises(AttachmentError, match="copied"):
        copy.deepcopy(case.model)


def test_detach_says_what_it_cannot_restore() -> None:
    case = llava()
    owner = case.model.model
    run = tr.attach(case.model, UnevenRandom())
    ours = owner.get_placeholder_mask
    owner.get_placeholder_mask = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(AttachmentError, match="reverse order"):
        run.detach()
    assert not case.model.model.language_model._forward_pre_hooks
    del owner.get_placeholder_mask


# -- controls -------------------------------------------------------------------------------------


def test_disabled_and_budget_hold_for_their_context_only() -> None:
    case = llava()
    plain = generate(case)[0]
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep=8)) as run:
        with run.disabled():
            assert torch.equal(generate(case)[0], plain)
            assert run.receipt.reason == "the attachment is disabled"
        with run.budget(keep=4):
            generate(case)
            assert [item.tokens_out for item in run.receipt.items] == [4, 4]
        generate(case)
        assert [item.tokens_out for item in run.receipt.items] == [8, 8]
        with pytest.raises(BudgetError, match="two budgets"), run.budget(keep=4, reduction=2):
            pass
        with pytest.raises(BudgetError, match="no budget"), run.budget():
            pass
        with pytest.raises(AttachmentError, match="stages 0 to 0"), run.budget(keep=4, stage=-1):
            pass


def test_total_is_shared_among_the_images_of_a_prompt() -> None:
    case = CASES["llava-several-images"]()
    stage = tr.Stage(reducer=tr.create_strategy("norm-topk"), total=24)
    with tr.attach(case.model, stage) as run:
        logits(case)
        assert [item.tokens_out for item in run.receipt.items] == [8, 8, 8, 16]
        with run.budget(total=48):
            plain = logits(case)
            assert run.receipt.ratio == 1.0
    assert torch.equal(plain, logits(case))


def test_reductions_tell_where_kept_tokens_lie(case: Case) -> None:
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep=3)) as run:
        logits(case)
        assert len(run.reductions) == len(case.items)
        for found, item in zip(run.reductions, case.items, strict=True):
            coords = torch.tensor(item.coords)
            assert found.prompt == item.prompt
            assert torch.equal(found.layout.coords, coords)
            assert found.layout.protected.nonzero().squeeze(1).tolist() == list(item.protected)
            assert torch.equal(found.coords, coords[found.kept])
            assert len(found.kept) == 3 + len(item.protected)
            ids = case.inputs["input_ids"][found.prompt, found.columns]
            assert bool((ids == item.token).all())


def test_receipt_counts_what_happened() -> None:
    case = CASES["llava-several-images"]()
    with tr.attach(case.model, tr.create_strategy("norm-topk", reduction=4)) as run:
        with pytest.raises(AttachmentError, match="has not run"):
            _ = run.receipt
        logits(case)
        receipt = run.receipt
    assert (receipt.tokens_in, receipt.tokens_out) == (64, 16)
    assert receipt.tokens_per_layer == (16,) * 4
    # keys and values of 2 heads of 16 float32 in 4 layers
    assert receipt.kv_bytes_per_token == 2 * 4 * 2 * 16 * 4
    assert receipt.kv_bytes_saved == 48 * receipt.kv_bytes_per_token
    assert receipt.sequence_in == 60
    assert receipt.sequence_out == 60 - 48 + 12
    assert receipt.selection_ms > 0
    assert receipt.as_dict()["items"][0]["stages"][0]["strategy"] == "norm-topk"


def test_tokens_that_the_caller_masked_out_stay_out() -> None:
    case = llava("right")
    mask = case.inputs["attention_mask"]
    mask[0, 6:10] = 0
    with torch.no_grad():
        stock = case.model(**case.batch()).logits[0, -1]
        # The one token that goes is among those that are masked out anyhow.
        with tr.attach(case.model, Chooses(keep=15, indices=[i for i in range(16) if i != 5])):
            attached = case.model(**case.batch()).logits[0, -1]
    assert (attached - stock).abs().max() < 1e-5


def test_reasons_where_nothing_was_reduced() -> None:
    case = llava()
    text = {"input_ids": torch.tensor([[BOS, *words(5, 1)]])}
    with tr.attach(case.model, KeepsAll()) as run:
        before = logits(case)
        assert run.receipt.reason == "the strategy chose to keep all"
        case.model(**text)
        assert run.receipt.reason == "a text-only turn"
        assert run.reductions == ()
    assert torch.equal(logits(case), before)


# -- refusals --------------------------------------------------------------------------------------


def test_attaching_twice_is_refused() -> None:
    case = llava()
    with tr.attach(case.model, UnevenRandom()), pytest.raises(AttachmentError, match="already"):
        tr.attach(case.model, UnevenRandom())
    tr.attach(case.model, UnevenRandom()).detach()


def test_text_only_models_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=PAD,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="text-only"):
        tr.attach(LlamaForCausalLM(config), UnevenRandom())
    with pytest.raises(UnsupportedModel, match="no installed model adapter"):
        tr.attach(torch.nn.Linear(2, 2), UnevenRandom())


def test_stages_that_cannot_run_are_refused_before_anything_is_touched() -> None:
    case = llava()
    before = anatomy(case.model)
    with pytest.raises(BudgetError, match="no budget"):
        tr.attach(case.model, tr.create_strategy("norm-topk"))
    with pytest.raises(UnsupportedSite, match="frames"):
        tr.attach(case.model, tr.Stage(reducer=UnevenRandom(), site="frames"))
    assert anatomy(case.model) == before


def test_a_signal_that_the_model_cannot_give_is_refused() -> None:
    case = CASES["qwen2.5-vl"]()
    status = installed().load("needy", needy)
    assert status.state == "loaded", status.error
    try:
        with pytest.raises(MissingSignal, match="class_attention"):
            tr.attach(case.model, tr.create_strategy("needy", keep=4))
    finally:
        for name in needy.NAMES:
            installed().strategies.remove(name)


def test_an_empty_prompt_is_refused() -> None:
    case = llava()
    with tr.attach(case.model, UnevenRandom()), pytest.raises(MediaError, match="empty prompt"):
        case.model(input_ids=torch.zeros(1, 0, dtype=torch.long))


def test_visual_tokens_that_a_stage_never_saw_are_an_error() -> None:
    case = llava()
    owner = case.model.model
    with tr.attach(case.model, UnevenRandom()):
        ours = owner.get_placeholder_mask
        owner.get_placeholder_mask = type(owner).get_placeholder_mask.__get__(owner)
        with pytest.raises(StageNotEngaged, match="never saw"):
            logits(case)
        owner.get_placeholder_mask = ours


def test_static_cache_of_a_full_length_is_supported_by_forward() -> None:
    case = llava()
    single = Case(
        case.model, {name: value[:1] for name, value in case.inputs.items()}, case.items[:1]
    )
    reducer = UnevenRandom()
    expected = reference.greedy(single, reducer, 1)[1][0]
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=64)
    with tr.attach(case.model, reducer), torch.no_grad():
        out = case.model(**single.batch(), past_key_values=cache)
    assert (out.logits[:, -1] - expected).abs().max() < 1e-5


# -- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    case = llava()
    reducer = EveryOther(reduction=4)
    expected = reference.greedy(case, reducer, 1)[1][0]
    case.model.to(dtype)
    case.inputs["pixel_values"] = case.inputs["pixel_values"].to(dtype)
    before, ids = logits(case), generate(case)[0]
    with tr.attach(case.model, reducer) as run:
        with run.disabled():
            assert torch.equal(logits(case), before)
            assert torch.equal(generate(case)[0], ids)
        reduced = logits(case)[:, -1]
        assert run.receipt.tokens_out == 8
    assert reduced.dtype == dtype
    tolerance = 20 * torch.finfo(dtype).eps * float(expected.abs().max())
    assert (reduced.float() - expected).abs().max() < tolerance
