"""Stages inside vision towers against the unmodified model and an independent recomputation."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

import tokenreduce as tr
from support import reference
from support.reducers import LargestNorm, MatchesKeys, UnevenRandom
from support.tiny_models import (
    BOS,
    CASES,
    IMAGE,
    TEXT,
    Case,
    enable_checkpointing,
    lively,
    llava,
    onevision,
    pad,
    words,
)
from support.tower_reference import TowerOracle
from tokenreduce.errors import (
    AttachmentError,
    BudgetError,
    MissingSignal,
    PipelineError,
    StageNotEngaged,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce.plugins import installed

STEPS = 4


def onevision_images(side: str = "left") -> Case:
    """Two tiled images of different size, without the clip."""
    case = onevision(side)
    ids = case.inputs["input_ids"]
    case.inputs["input_ids"] = ids.masked_fill(ids == case.items[2].token, 30)
    del case.inputs["pixel_values_videos"]
    return Case(case.model, case.inputs, case.items[:2])


def dinov2(side: str = "left") -> Case:
    """LLaVA with a DINOv2 tower."""
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    model = lively(transformers.LlavaForConditionalGeneration(config))
    stock = llava(side)
    return Case(model, stock.inputs, stock.items)


TOWERS = {**CASES, "onevision": onevision_images, "dinov2": dinov2}


@pytest.fixture(params=TOWERS)
def case(request: pytest.FixtureRequest) -> Case:
    return TOWERS[request.param]()


def inside(reducer: tr.Reducer, **options: Any) -> tr.Stage:
    return tr.Stage(reducer=reducer, site="vision", **options)


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


def generate(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """New ids ``(B, steps)`` and their logits ``(steps, B, V)``."""
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        result = case.model.generate(
            **case.batch(), **options, return_dict_in_generate=True, output_logits=True
        )
    return result.sequences[:, case.inputs["input_ids"].shape[1] :], torch.stack(result.logits)


def test_keep_all_is_bit_identical(case: Case) -> None:
    before, (ids, steps) = logits(case), generate(case)
    with tr.attach(case.model, inside(MatchesKeys(keep_ratio=1.0))) as run:
        assert torch.equal(logits(case), before)
        attached_ids, attached_steps = generate(case)
        assert torch.equal(attached_ids, ids)
        assert torch.equal(attached_steps, steps)
        assert run.receipt.ratio == 1.0
        assert "within the budget" in run.receipt.reason


@pytest.mark.parametrize("reducer", [MatchesKeys(), LargestNorm()], ids=["merges", "drops"])
def test_generation_equals_an_independent_recomputation(case: Case, reducer: tr.Reducer) -> None:
    oracle = TowerOracle(case, reducer, 0.5)
    expected_ids, expected = reference.greedy(case, oracle, STEPS)
    unreduced = generate(case)[1]
    with tr.attach(case.model, inside(reducer.with_budget(keep_ratio=0.5))) as run:
        ids, steps = generate(case)
        assert (steps - expected).abs().max() < 2e-5
        assert torch.equal(ids, expected_ids)
        assert not torch.allclose(steps[0], unreduced[0], atol=1e-3)
        assert run.receipt.tokens_out < run.receipt.tokens_in


def hooks_and_methods(model: Any) -> list[Any]:
    return [
        (
            sorted(vars(m)),
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
            id(vars(m).get("config")),
        )
        for m in model.modules()
    ]


def test_detach_leaves_no_trace(case: Case) -> None:
    before = logits(case)
    state = hooks_and_methods(case.model)
    run = tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5)))
    reduced = logits(case)
    assert not torch.equal(reduced, before)
    with pytest.raises(AttachmentError, match="copied"):
        copy.deepcopy(case.model)
    run.detach()
    run.detach()
    assert hooks_and_methods(case.model) == state
    assert torch.equal(logits(case), before)


def test_the_tower_runs_on_fewer_tokens(case: Case) -> None:
    model = case.model.model
    tower = model.visual if hasattr(model, "visual") else model.vision_tower
    linear = [m for n, m in tower.named_modules() if n.endswith(("fc1", "up_proj", "linear_fc1"))]
    blocks = [m for m in linear if m.in_features == linear[0].in_features]

    def lengths() -> list[int]:
        seen: list[int] = []
        handles = [
            m.register_forward_hook(lambda _, a, o: seen.append(a[0].shape[-2])) for m in blocks
        ]
        logits(case)
        for handle in handles:
            handle.remove()
        return seen

    stock = lengths()
    with tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5))):
        shorter = lengths()
    assert len(shorter) == len(stock)
    assert all(a <= b for a, b in zip(shorter, stock, strict=True))
    assert sum(shorter) < sum(stock)


def test_a_projector_stage_follows(case: Case) -> None:
    oracle = TowerOracle(case, MatchesKeys(), 0.5)
    after = tr.create_strategy("norm-topk", keep=2)

    def both(tokens: tr.VisualTokens) -> Any:
        told = oracle(tokens)
        layout = tokens.layout.select(told.positions[0])
        second = after(tr.VisualTokens(told.features, layout))
        kept = second.positions[0]
        told.positions, told.features = told.positions[:, kept], second.features
        told.deepstack = iter([d[:, kept] for d in told.deepstack])
        return told

    expected_ids, expected = reference.greedy(case, both, STEPS)
    stages = [inside(MatchesKeys(keep_ratio=0.5)), tr.Stage(reducer=after)]
    with tr.attach(case.model, stages) as run:
        ids, steps = generate(case)
        assert (steps - expected).abs().max() < 2e-5
        assert torch.equal(ids, expected_ids)
        assert [s.site for s in run.receipt.items[0].stages] == ["vision", "projector"]


def test_members_of_a_cluster_carry_equal_features(case: Case) -> None:
    """Whatever the model makes of the tower's output: unpadding included."""
    if "image_sizes" in case.inputs:
        case.inputs["image_sizes"] = torch.tensor([[112, 112], [20, 100]])
        case.inputs["input_ids"][1] = torch.tensor(
            pad([[BOS, *[IMAGE] * (16 + 2 * 9), *words(60, 4)]], "left")["input_ids"][0].tolist()
            + [30] * 200
        )[: case.inputs["input_ids"].shape[1]]
        case.inputs["attention_mask"][1] = 1
    embeds: list[torch.Tensor] = []
    decoder = reference.text_decoder(case)
    with tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.4))) as run:
        decoder.register_forward_pre_hook(
            lambda _, a, k: embeds.append(k["inputs_embeds"]), with_kwargs=True, prepend=True
        )
        logits(case)
        for item in run.reductions:
            features = embeds[0][item.prompt, item.columns]
            leads = item.kept[item.assignment]
            assert torch.allclose(features, features[leads], atol=1e-6)
            assert item.reduction.kept < len(item.layout)


@pytest.mark.parametrize("name", ["llava-several-images", "internvl", "qwen2.5-vl"])
def test_sequences_of_unequal_length(name: str) -> None:
    """Adaptive strategies keep another count of every image; alone or in a batch, the same."""
    case = CASES[name]()
    with tr.attach(case.model, inside(UnevenRandom(), layer=1)) as run:
        logits(case)
        together = run.reductions
        counts = [item.reduction.kept for item in together if item.reduction]
        assert len(set(counts)) > 1 or name == "internvl"


def test_unequal_sequences_equal_those_alone() -> None:
    case = CASES["llava-several-images"]()
    model, pixels = case.model.model, case.inputs["pixel_values"]
    with tr.attach(case.model, inside(UnevenRandom(), layer=1)), torch.no_grad():
        together = model.get_image_features(pixels).pooler_output
        alone = [model.get_image_features(p[None]).pooler_output[0] for p in pixels]
    for a, b in zip(together, alone, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_schedules_and_single_cuts() -> None:
    case = llava()
    for stage, expected in (
        (inside(MatchesKeys(), schedule={1: 0.75, 2: 0.5}), 8),
        (inside(MatchesKeys(keep=9), layer=2), 9),
        (inside(MatchesKeys(keep=6)), 6),
    ):
        with tr.attach(case.model, stage) as run:
            logits(case)
            assert [i.tokens_out for i in run.receipt.items] == [expected, expected]
            assert run.receipt.items[0].stages[0].layer == stage.layer


def test_several_stages_follow_one_another() -> None:
    case = llava()
    stages = [inside(MatchesKeys(keep=12), layer=1), inside(LargestNorm(keep=7), layer=2)]
    with tr.attach(case.model, stages) as run:
        logits(case)
        done = [(s.tokens_in, s.tokens_out) for s in run.receipt.items[0].stages]
        assert done == [(16, 12), (12, 7)]


def test_disabled_and_budget_act_at_the_next_encoding() -> None:
    case = llava()
    before = logits(case)
    with tr.attach(case.model, inside(MatchesKeys(keep=8))) as run:
        with run.disabled():
            assert torch.equal(logits(case), before)
        with run.budget(keep=6):
            logits(case)
            assert run.receipt.tokens_out == 12
        logits(case)
        assert run.receipt.tokens_out == 16
        with run.disabled(), torch.no_grad():
            encoded = case.model.model.get_image_features(case.inputs["pixel_values"])
        batch = case.batch()
        del batch["pixel_values"]
        with torch.no_grad(), pytest.raises(StageNotEngaged, match="while it was disabled"):
            case.model(**batch, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("name", TOWERS)
def test_beams(name: str) -> None:
    case = TOWERS[name]()
    with tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5))) as run:
        generate(case, num_beams=2)
        assert run.receipt.ratio < 0.7


def test_threads_share_a_model() -> None:
    case = llava()
    with tr.attach(case.model, inside(MatchesKeys(keep=6))):
        expected = logits(case)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: logits(case), range(8)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "internvl"])
def test_gradients_flow(name: str, checkpointing: bool) -> None:
    case = CASES[name]()
    model = case.model.train()
    labels = case.inputs["input_ids"]
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    parameter = next(p for n, p in tower.named_parameters() if "patch" in n and p.ndim > 2)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**case.batch(), labels=labels, use_cache=False).loss.backward()
        return parameter.grad.clone()

    with tr.attach(model, inside(MatchesKeys(keep_ratio=0.5))):
        expected = gradient()
        assert expected.abs().max() > 0
        if checkpointing:
            enable_checkpointing(model)
            blocks = [part for part in tower.modules() if hasattr(part, "gradient_checkpointing")]
            # Blocks of releases before 5.23 recompute their hooks too.
            replays = any(type(block).__call__ is not torch.nn.Module.__call__ for block in blocks)
            if name == "internvl" or replays:
                with pytest.raises(UnsupportedModel, match="checkpointing"):
                    gradient()
            else:
                assert torch.allclose(gradient(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "internvl"])
def test_eager_attention_agrees(name: str) -> None:
    case = CASES[name]()
    with tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5))):
        expected, real = logits(case), case.inputs["attention_mask"].bool()
        case.model.set_attn_implementation("eager")
        assert (logits(case) - expected)[real].abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for name in ("llava", "qwen2.5-vl"):
        case = CASES[name]()
        case.model.to(dtype)
        for key in ("pixel_values", "pixel_values_videos"):
            if key in case.inputs:
                case.inputs[key] = case.inputs[key].to(dtype)
        with tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5))) as run:
            assert logits(case).isfinite().all()
            assert run.receipt.ratio == 0.5


def test_hidden_states_keep_their_shape() -> None:
    case = llava()
    pixels = case.inputs["pixel_values"]
    with tr.attach(case.model, inside(MatchesKeys(keep=6))), torch.no_grad():
        out = case.model.model.get_image_features(pixels, output_hidden_states=True)
    assert [h.shape[1] for h in out.hidden_states] == [17] * 4
    assert len(out.hidden_states[2][0, 1:].unique(dim=0)) == 6


@pytest.mark.parametrize("name", ["llava", "llava-next", "internvl", "qwen3-vl"])
def test_registered_strategies(name: str) -> None:
    strategies = [n for n, r in installed().strategies.items() if "vision" in r.sites]
    assert "tome" in strategies
    for strategy in strategies:
        case = TOWERS[name]()
        reducer = tr.create_strategy(strategy, keep_ratio=0.5)
        with tr.attach(case.model, inside(reducer)) as run:
            logits(case)
            assert run.receipt.ratio < 0.6


def test_a_compiled_tower_is_followed() -> None:
    case = llava()
    stage = inside(MatchesKeys(keep=6))
    with tr.attach(case.model, stage):
        expected = logits(case)
    case.model.model.vision_tower.compile(backend="eager")
    stock = logits(case)
    with tr.attach(case.model, stage) as run:
        assert (logits(case) - expected).abs().max() < 1e-5
        assert run.receipt.tokens_out == 12
    assert torch.equal(logits(case), stock)
    torch.compiler.reset()


def test_a_tower_takes_one_pipeline() -> None:
    case = llava()
    with (
        tr.attach(case.model, inside(MatchesKeys(keep=6))),
        pytest.raises(AttachmentError, match="already"),
    ):
        tr.attach(case.model.model.vision_tower, inside(MatchesKeys(keep=6)))


class Unknown(torch.nn.Module):
    """A block of a class that nobody has heard of."""


def test_what_cannot_work_is_refused() -> None:
    case = llava()
    model = case.model
    for stage, error, words_ in (
        (inside(MatchesKeys(keep=6), layer=3), PipelineError, "no effect"),
        (inside(MatchesKeys(keep=6), total=8), UnsupportedSite, "prompt"),
    ):
        with pytest.raises(error, match=words_):
            tr.attach(model, stage)
    with pytest.raises(PipelineError, match="follow one another"):
        tr.attach(model, [inside(MatchesKeys(keep=6)), inside(MatchesKeys(keep=6))])
    with pytest.raises(MissingSignal, match="class_attention"):
        tr.attach(model, [inside(MatchesKeys(keep=8)), tr.create_strategy("fastervlm", keep=4)])
    blocks = model.model.vision_tower.encoder.layers
    kept, blocks[1] = blocks[1], Unknown()
    with pytest.raises(UnsupportedModel, match="Unknown"):
        tr.attach(model, inside(MatchesKeys(keep=6)))
    blocks[1] = kept
    state = hooks_and_methods(model)
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="sdpa"):
        tr.attach(model, inside(MatchesKeys(keep=6)))
    assert hooks_and_methods(model) == state


def test_clips_that_are_pooled_are_refused() -> None:
    case = onevision()
    with (
        tr.attach(case.model, inside(MatchesKeys(keep_ratio=0.5))),
        pytest.raises(UnsupportedSite, match="bilinearly"),
    ):
        logits(case)


def test_a_budget_below_one_token_a_tile_is_refused() -> None:
    case = onevision_images()
    with (
        tr.attach(case.model, inside(MatchesKeys(keep=2))),
        pytest.raises(BudgetError, match="tiles"),
    ):
        logits(case)


def test_tiles_share_the_budget_of_their_image() -> None:
    case = onevision_images()
    with tr.attach(case.model, inside(LargestNorm(keep=12))) as run:
        logits(case)
        free = [item.tokens_out - item.stages[-1].protected for item in run.receipt.items]
        assert free == [12, 12]
