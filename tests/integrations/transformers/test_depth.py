"""Stages between the layers of the LLM, against an independent recomputation."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support import depth_reference, reference
from support.reducers import EveryOther
from support.tiny_models import (
    CASES,
    CLIP,
    IMAGE,
    TEXT,
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
    PipelineError,
    UnsupportedSite,
)
from tokenreduce_integrations.transformers.depth import at_depth, replays_hooks

STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Loudest(tr.Scorer):
    """Keeps hidden states of largest norm."""

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)


def decoder_stage(schedule: dict[float, float], reducer: tr.Reducer | None = None) -> tr.Stage:
    return tr.Stage(reducer=reducer or Loudest(), site="decoder", schedule=schedule)


def as_cuts(stage: tr.Stage) -> dict[int, tuple[tr.Reducer, float]]:
    return {layer: (stage.reducer, share) for layer, share in stage.schedule}


def generate(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        result = case.model.generate(
            **case.batch(), **options, return_dict_in_generate=True, output_logits=True
        )
    return result.sequences[:, case.inputs["input_ids"].shape[1] :], torch.stack(result.logits)


def single(case: Case) -> Case:
    """The first prompt of a LLaVA case alone."""
    return Case(
        case.model, {name: value[:1] for name, value in case.inputs.items()}, case.items[:1]
    )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_keep_all_is_bit_identical(name: str, side: str) -> None:
    case = CASES[name](side)
    with torch.no_grad():
        before = case.model(**case.batch()).logits
    ids, steps = generate(case)
    with tr.attach(case.model, decoder_stage({1: 1.0, 2: 1.0})) as run, torch.no_grad():
        assert torch.equal(case.model(**case.batch()).logits, before)
        attached_ids, attached_steps = generate(case)
        assert torch.equal(attached_ids, ids)
        assert torch.equal(attached_steps, steps)
        assert run.receipt.ratio == 1.0
        assert "within the budget" in run.receipt.reason


STAGES = {
    "one layer": decoder_stage({2: 0.4}),
    "a schedule": decoder_stage({1: 0.6, 3: 0.3}),
    "merging": decoder_stage({1: 0.5, 2: 0.25}, EveryOther()),
    "all leave": decoder_stage({1: 0.5, 3: 0}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_generation_equals_an_independent_recomputation(case: Case, stage: str) -> None:
    expected_ids, expected = depth_reference.greedy(case, as_cuts(STAGES[stage]), STEPS)
    unreduced = generate(case)[1]
    with tr.attach(case.model, STAGES[stage]):
        ids, steps = generate(case)
        assert torch.equal(ids, expected_ids)
        assert (steps - expected).abs().max() < 2e-5
        assert not torch.allclose(steps[0], unreduced[0], atol=1e-3)
        assert torch.equal(generate(case, use_cache=False)[0], expected_ids)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_stacks_with_the_projector_site(case: Case, attention: str) -> None:
    case.model.set_attn_implementation(attention)
    before = tr.create_strategy("norm-topk", keep_ratio=0.7)
    stage = STAGES["a schedule"]
    expected_ids, expected = depth_reference.greedy(case, as_cuts(stage), STEPS, before)
    with tr.attach(case.model, [before, stage]) as run:
        ids, steps = generate(case)
    assert torch.equal(ids, expected_ids)
    assert (steps - expected).abs().max() < 2e-5
    counts = run.receipt.tokens_per_layer
    assert counts[0] > counts[1] == counts[2] > counts[3]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava-several-images", "qwen2.5-vl", "qwen3-vl"])
def test_forward_has_the_shape_of_the_given_sequence(name: str, side: str) -> None:
    case = CASES[name](side)
    stage = STAGES["a schedule"]
    with tr.attach(case.model, stage), torch.no_grad():
        batch = case.batch()
        if not name.startswith("qwen"):
            mask = case.inputs["attention_mask"]
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        logits = case.model(**batch).logits
    assert logits.shape[:2] == case.inputs["input_ids"].shape
    from support.reducers import KeepsAll

    head = case.model.get_output_embeddings()
    for row, prompt in enumerate(reference.reduced_prompts(case, KeepsAll())):
        items = depth_reference.items_of(case, row, prompt.columns)
        with torch.no_grad():
            hidden, columns = depth_reference.layers_of(
                case, prompt, items, prompt.embeds, prompt.positions, as_cuts(stage)
            )
            expected = head(hidden)[0]
        assert (logits[row, prompt.columns[columns]] - expected).abs().max() < 2e-5


def test_the_cache_really_shrinks_and_the_receipt_says_so() -> None:
    case = llava()
    with tr.attach(case.model, decoder_stage({1: 0.5, 3: 0.25})) as run, torch.no_grad():
        cache = case.model(**case.batch(), use_cache=True).past_key_values
        receipt = run.receipt
    text = (case.inputs["attention_mask"].sum(1) - 16).max()
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held == [text + 16, text + 8, text + 8, text + 4]
    assert receipt.tokens_per_layer == (32, 16, 16, 8)
    assert receipt.tokens_out == 8
    per_layer = 2 * 2 * 16 * 4
    assert receipt.kv_bytes == (32 + 16 + 16 + 8) * per_layer
    assert receipt.kv_bytes_saved == 4 * 32 * per_layer - receipt.kv_bytes
    assert [stage["layer"] for stage in receipt.as_dict()["items"][0]["stages"]] == [1, 3]
    assert "8 (Loudest at decoder layer 1)" in str(receipt)
    assert [len(item.kept) for item in run.reductions] == [4, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llava-several-images", "qwen2.5-vl", "qwen3-vl"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]()
    stage = decoder_stage({1: 0.6, 3: 0.3}, tr.create_strategy("uniform"))
    expected = depth_reference.greedy(case, as_cuts(stage), 1)[1][0]
    case.model.to(dtype)
    for key, value in case.inputs.items():
        if value.is_floating_point() and key.startswith("pixel"):
            case.inputs[key] = value.to(dtype)
    plain = generate(case)
    with tr.attach(case.model, decoder_stage({1: 1.0})):
        assert all(torch.equal(*pair) for pair in zip(generate(case), plain, strict=True))
    with tr.attach(case.model, stage):
        logits = generate(case)[1][0].float()
    # Roundings of the last bit add up over four layers.
    scale = expected.abs().max() * (2**-8 if dtype is torch.bfloat16 else 2**-11)
    assert (logits - expected).abs().max() < 16 * scale


def test_beams_equal_those_of_a_prompt_alone() -> None:
    case = llava()
    stage = STAGES["a schedule"]
    with tr.attach(case.model, stage):
        together = generate(case, num_beams=3)[0]
        for row in range(2):
            real = case.inputs["attention_mask"][row].bool()
            alone = Case(
                case.model,
                {
                    "input_ids": case.inputs["input_ids"][row : row + 1, real],
                    "attention_mask": torch.ones(1, int(real.sum()), dtype=torch.long),
                    "pixel_values": case.inputs["pixel_values"][row : row + 1],
                },
                (),
            )
            assert torch.equal(generate(alone, num_beams=3)[0][0], together[row])


def test_a_second_turn_continues_the_kept_cache() -> None:
    case = single(llava())
    more = torch.tensor([words(4, 11)])
    whole = dict(case.inputs)
    whole["input_ids"] = torch.cat([case.inputs["input_ids"], more], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    stage = STAGES["a schedule"]
    long = Case(case.model, whole, case.items)
    expected = depth_reference.greedy(long, as_cuts(stage), 1)[1][0]
    with tr.attach(case.model, stage), torch.no_grad():
        cache = case.model(**case.batch(), use_cache=True).past_key_values
        assert cache.get_seq_length() == case.inputs["input_ids"].shape[1]
        second = case.model(input_ids=more, past_key_values=cache)
    assert (second.logits[:, -1] - expected).abs().max() < 2e-5


def test_a_second_turn_may_bring_another_image() -> None:
    case = single(llava())
    more = torch.tensor([[IMAGE] * 16 + words(3, 12)])
    picture = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    whole = {
        "input_ids": torch.cat([case.inputs["input_ids"], more], 1),
        "pixel_values": torch.cat([case.inputs["pixel_values"], picture]),
    }
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    items = (case.items[0], case.items[0])
    stage = STAGES["a schedule"]
    expected = depth_reference.greedy(Case(case.model, whole, items), as_cuts(stage), 1)[1][0]
    with tr.attach(case.model, stage), torch.no_grad():
        cache = case.model(**case.batch(), use_cache=True).past_key_values
        second = case.model(input_ids=more, pixel_values=picture, past_key_values=cache)
    assert (second.logits[:, -1] - expected).abs().max() < 2e-5


def test_prompt_lookup_crops_every_layer() -> None:
    case = single(llava())
    stage = STAGES["a schedule"]
    expected = depth_reference.greedy(case, as_cuts(stage), STEPS)[0]
    with tr.attach(case.model, stage):
        assert torch.equal(generate(case, prompt_lookup_num_tokens=3)[0], expected)


def prefilled(case: Case) -> Any:
    with torch.no_grad():
        return case.model(**case.batch(), use_cache=True).past_key_values


def continued(model: Any, cache: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        ids = torch.tensor(tokens)[:, None]
        return model(input_ids=ids, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_cache_can_be_copied_and_its_rows_moved(duplicate: Any) -> None:
    case = CASES["llava-several-images"]()
    with tr.attach(case.model, STAGES["a schedule"]):
        expected = continued(case.model, prefilled(case), [30, 31, 32])
        twin = duplicate(prefilled(case))
        twin.batch_select_indices(torch.tensor([2, 0]))
        moved = continued(case.model, twin, [32, 30])
        assert torch.allclose(moved, expected[[2, 0]], atol=1e-5)
        twice = prefilled(case)
        twice.batch_repeat_interleave(2)
        moved = continued(case.model, twice, [30, 30, 31, 31, 32, 32])
        assert torch.allclose(moved[::2], expected, atol=1e-5)


def test_a_cache_is_continued_only_with_its_stages() -> None:
    case = llava()
    with tr.attach(case.model, STAGES["a schedule"]) as run:
        cache = prefilled(case)
        with run.disabled():
            disabled = continued(case.model, copy.deepcopy(cache), [30, 31])
        assert torch.equal(disabled, continued(case.model, copy.deepcopy(cache), [30, 31]))
    with pytest.raises(AttachmentError, match="continue it while"):
        continued(case.model, copy.deepcopy(cache), [30, 31])
    with (
        tr.attach(case.model, tr.create_strategy("uniform", reduction=2)),
        pytest.raises(AttachmentError, match="after layers 1, 3"),
    ):
        continued(case.model, cache, [30, 31])


def test_gradients_flow_through_what_stays() -> None:
    case = llava("right")
    model = case.model.train()
    labels = case.inputs["input_ids"].masked_fill(case.inputs["input_ids"] == IMAGE, -100)
    labels = labels.masked_fill(case.inputs["attention_mask"] == 0, -100)

    def gradients() -> tuple[float, list[Tensor]]:
        model.zero_grad()
        loss = model(**case.batch(), labels=labels).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with tr.attach(model, STAGES["merging"]):
        loss, plain = gradients()
        enable_checkpointing(model)
        if replays_hooks(model.model.language_model.layers[0]):
            with pytest.raises(UnsupportedSite, match="Upgrade to transformers"):
                gradients()
            return
        again, checkpointed = gradients()
    assert loss == pytest.approx(again, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, checkpointed, strict=True))
    tower = model.model.vision_tower.parameters()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower)


def traces(module: Any) -> list[Any]:
    return [
        (
            name,
            type(part),
            # rope_deltas are Qwen's own memory of the latest call.
            {k: id(v) for k, v in vars(part).items() if k[0] != "_" and k != "rope_deltas"},
            list(part._forward_hooks),
            list(part._forward_pre_hooks),
        )
        for name, part in module.named_modules()
    ]


def test_detaching_leaves_no_trace(case: Case) -> None:
    plain = generate(case)
    before = traces(case.model)
    stage = tr.Stage(reducer=AsksAll(keep_ratio=0.5), site="decoder", layer=2)
    with tr.attach(case.model, stage):
        assert not torch.equal(generate(case)[1], plain[1])
    assert traces(case.model) == before
    assert torch.equal(generate(case)[1], plain[1])


# -- signals --------------------------------------------------------------------------------------

SIGNALS = (
    "last_token_attention",
    "prompt_attention",
    "decoder_received_attention",
    "attention_page_rank",
    "unrotated_attention",
    "decoder_keys",
    "prompt_keys",
    "prompt_states",
)
SEEN: list[tr.VisualTokens] = []


@dataclass(frozen=True, kw_only=True)
class AsksAll(tr.Scorer):
    """Keeps what the prompt's last token attends to, and remembers every signal."""

    @property
    def needs(self) -> tuple[str, ...]:
        return SIGNALS

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        SEEN.append(tokens)
        return tokens.signal("last_token_attention")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
def test_signals_equal_eager_attention(name: str, side: str) -> None:
    case = CASES[name](side)
    stage = tr.Stage(reducer=AsksAll(keep_ratio=0.5), site="decoder", layer=2)
    SEEN.clear()
    with tr.attach(case.model, stage) as run, torch.no_grad():
        case.model(**case.batch())
        placed = [(item.prompt, item.columns[item.layout.free]) for item in run.reductions]
        everywhere = [(item.prompt, item.columns) for item in run.reductions]
    case.model.set_attn_implementation("eager")
    with torch.no_grad():
        out = case.model(**case.batch(), output_attentions=True, output_hidden_states=True)
    attention, states = out.attentions[1].mean(1), out.hidden_states[2]
    mask = case.inputs["attention_mask"].bool()
    visual = torch.zeros_like(mask)
    for prompt, columns in everywhere:
        visual[prompt, columns] = True
    seen = [tokens.item(row) for tokens in SEEN for row in range(tokens.batch)]
    assert len(seen) == len(placed)
    for prompt, columns in placed:
        last = mask[prompt].nonzero()[-1, 0]
        text = (mask & ~visual)[prompt].nonzero().squeeze(1)
        text = text[text > columns[-1]]
        if not len(text):
            text = last[None]
        expected = attention[prompt][last, columns]
        [mine] = [
            tokens
            for tokens in seen
            if tokens.count == len(columns)
            and torch.allclose(tokens.signal("last_token_attention")[0], expected, atol=1e-5)
        ]
        rows = attention[prompt][text][:, columns].T
        assert torch.allclose(mine.signal("prompt_attention")[0], rows, atol=1e-5)
        received = attention[prompt][mask[prompt]].mean(0)[columns]
        assert torch.allclose(mine.signal("decoder_received_attention")[0], received, atol=1e-5)
        # A softmax at another temperature is the power of the softmax, scaled to sum to one.
        walks = out.attentions[1][prompt][:, mask[prompt]][..., mask[prompt]].double().pow(10)
        walks = walks / walks.sum(-1, keepdim=True)
        steps = walks.matrix_power(5).mean(1).square().mean(0).sqrt()
        rank = torch.zeros(mask.shape[1]).masked_scatter(mask[prompt], steps.float())[columns]
        assert torch.allclose(mine.signal("attention_page_rank")[0], rank, atol=1e-5)
        assert torch.allclose(mine.signal("prompt_states")[0], states[prompt, text], atol=1e-4)
        assert mine.signal("decoder_keys").shape == (1, len(columns), 2 * 16)
        assert mine.signal("prompt_keys").shape == (1, len(text), 2 * 16)


# -- refusals -------------------------------------------------------------------------------------


def test_a_static_cache_is_refused() -> None:
    case = llava()
    with (
        tr.attach(case.model, STAGES["one layer"]),
        pytest.raises(UnsupportedSite, match="static cache"),
    ):
        generate(case, cache_implementation="static", disable_compile=True)


def test_a_sliding_window_shorter_than_the_sequence_is_refused() -> None:
    text = {"model_type": "mistral", "sliding_window": 8, "head_dim": 16, **TEXT}
    config = transformers.LlavaConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    model = lively(transformers.LlavaForConditionalGeneration(config))
    case = Case(model, llava().inputs, llava().items)
    with (
        tr.attach(model, STAGES["one layer"]),
        pytest.raises(UnsupportedSite, match="sliding window"),
    ):
        generate(case)


def test_shares_of_the_depth_are_layers_of_the_model() -> None:
    case = llava()
    with tr.attach(case.model, decoder_stage({2: 0.5, 3: 0.25})):
        expected = generate(case)
    with tr.attach(case.model, decoder_stage({0.5: 0.5, 0.75: 0.25})) as run:
        assert all(torch.equal(*pair) for pair in zip(generate(case), expected, strict=True))
        assert run.stages == (decoder_stage({2: 0.5, 3: 0.25}),)
        assert run.receipt.items[0].stages[1].layer == 3
    with pytest.raises(UnsupportedSite, match="a stage after layer 4"):
        tr.attach(case.model, decoder_stage({0.9: 0.5}))
    with pytest.raises(PipelineError, match="come to the layers 2, 2"):
        tr.attach(case.model, decoder_stage({0.5: 0.5, 0.6: 0.25}))
    with pytest.raises(UnsupportedSite, match="has no layers"):
        at_depth(torch.nn.Identity(), decoder_stage({0.5: 0.5}))


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="last place for a stage is layer=3"):
        tr.attach(llava().model, decoder_stage({4: 0.5}))


def test_layers_of_several_kinds_are_refused() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    text = {"model_type": "qwen2", "layer_types": kinds, "use_sliding_window": True, **TEXT}
    config = transformers.LlavaConfig(
        vision_config=CLIP, text_config=text, image_token_index=IMAGE, vision_feature_layer=-2
    )
    with pytest.raises(UnsupportedSite, match="mixes layers of type full_attention, sliding"):
        tr.attach(transformers.LlavaForConditionalGeneration(config), STAGES["one layer"])


def test_a_prompt_of_images_alone_cannot_lose_them_all() -> None:
    case = single(llava())
    case.inputs["input_ids"] = torch.full((1, 16), IMAGE)
    case.inputs["attention_mask"] = torch.ones(1, 16, dtype=torch.long)
    with (
        tr.attach(case.model, STAGES["all leave"]),
        torch.no_grad(),
        pytest.raises(MediaError, match="nothing would be left"),
    ):
        case.model(**case.batch())


def test_a_new_image_while_disabled_goes_through_whole() -> None:
    case = single(llava())
    more = torch.tensor([[IMAGE] * 16 + words(3, 12)])
    picture = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(5))
    with tr.attach(case.model, STAGES["one layer"]) as run, torch.no_grad():
        cache = case.model(**case.batch(), use_cache=True).past_key_values
        held = [layer.keys.shape[-2] for layer in cache.layers]
        with run.disabled():
            case.model(input_ids=more, pixel_values=picture, past_key_values=cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [n + 19 for n in held]


def test_a_failed_attach_leaves_nothing() -> None:
    case = CASES["qwen3-vl"]()
    before = traces(case.model)
    stages = [
        tr.Stage(reducer=tr.create_strategy("uniform", keep=1), site="frames"),
        tr.Stage(reducer=tr.create_strategy("tome", keep=4), site="vision", layer=1),
        STAGES["one layer"],
    ]
    with pytest.raises(UnsupportedSite, match="in one pipeline"):
        tr.attach(case.model, stages)
    assert traces(case.model) == before
    copy.deepcopy(case.model)


def test_what_another_library_put_on_an_instance_stays() -> None:
    model = CASES["qwen3-vl"]().model
    decoder = model.model.language_model
    original = decoder._deepstack_process
    decoder._deepstack_process = mine = lambda *args: original(*args)
    tr.attach(model, STAGES["one layer"]).detach()
    assert vars(decoder)["_deepstack_process"] is mine


def test_masked_images_are_refused() -> None:
    case = llava()
    case.inputs["attention_mask"][0, case.inputs["input_ids"][0] == IMAGE] = 0
    with (
        tr.attach(case.model, STAGES["one layer"]),
        torch.no_grad(),
        pytest.raises(UnsupportedSite, match="hides visual tokens"),
    ):
        case.model(**case.batch())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, PipelineError, "needs layer=2"),
        ({"layer": 0}, PipelineError, "no layer"),
        ({"layer": 2, "schedule": {3: 0.5}}, PipelineError, "not both"),
        ({"schedule": {}}, PipelineError, "maps layers to shares"),
        ({"schedule": {1: 0.25, 2: 0.5}}, BudgetError, "more than"),
        ({"schedule": {1: 1.5}}, BudgetError, "out of range"),
        ({"schedule": [(1, 0.5), (1, 0.25)]}, PipelineError, "twice"),
    ],
)
def test_bad_depths_are_refused(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        tr.Stage(reducer=Loudest(), site="decoder", **options)


def test_two_budgets_are_refused() -> None:
    with pytest.raises(BudgetError, match="two budgets"):
        tr.Stage(reducer=Loudest(keep=4), site="decoder", schedule={1: 0.5})
    with pytest.raises(PipelineError, match="site 'projector'"):
        tr.Stage(reducer=Loudest(keep=4), layer=1)
    with pytest.raises(BudgetError, match="only at the decoder site"):
        tr.Stage(reducer=Loudest(keep=0))
