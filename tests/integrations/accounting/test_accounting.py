"""FLOPs, bytes, budgets that state a cost, and the bench, against counts made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokenreduce as tr
from support.timm_llava import write_timm_llava
from support.tiny_models import CASES, CLIP, IMAGE, TEXT, internvl, llava, onevision, qwen2_5_vl
from tokenreduce.attachment import as_stages
from tokenreduce.errors import (
    BudgetError,
    PipelineError,
    UncountedOperator,
    UnsupportedModel,
    UnsupportedSite,
)
from tokenreduce.receipt import Receipt
from tokenreduce_integrations.accounting.bench import (
    Comparison,
    Side,
    break_even,
    compare,
    fastest_attention,
    repeated,
)
from tokenreduce_integrations.accounting.curves import language_model_cost
from tokenreduce_integrations.accounting.encoder import image_cost
from tokenreduce_integrations.accounting.estimate import estimate, estimate_both, tokens_by_layer
from tokenreduce_integrations.accounting.flops import Flops, count_flops
from tokenreduce_integrations.accounting.operators import formulas, is_costly
from tokenreduce_integrations.accounting.prices import TimePrice, time_prefill
from tokenreduce_integrations.accounting.timing import Times
from tokenreduce_integrations.accounting.weights import Weights, weigh
from tokenreduce_integrations.testbed.models import load
from tokenreduce_integrations.transformers.families import find_decoder
from tokenreduce_integrations.transformers.loading import load_model
from tokenreduce_integrations.transformers.skeleton import skeleton_of


def prompt(processor: Any, device: Any = "cpu") -> dict[str, Tensor]:
    text = "<image> " * 144 + "USER: what digit is shown ? ASSISTANT:"
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": torch.tensor([processor.tokenizer(text)["input_ids"]]),
        "pixel_values": pixels,
    }


def by_hand(config: Any, tokens: int) -> int:
    """Projections, a gated MLP, and attention over the full rectangle, in multiply-adds times 2."""
    text = config.text_config
    width, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = text.num_attention_heads * head, text.num_key_value_heads * head
    projections = 2 * tokens * width * (2 * queries + 2 * keys)
    return projections + 2 * 3 * tokens * width * inner + 4 * tokens**2 * queries


# -- FLOPs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_layers_cost_what_is_counted_by_hand(name: str) -> None:
    model = CASES[name]().model
    cost = language_model_cost(model)
    for tokens in (1, 7, 333):
        assert {layer.prefill(tokens) for layer in cost.layers} == {by_hand(model.config, tokens)}
    assert cost.head == 2 * 64 * 200


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_ran_is_what_the_configuration_says(attention: str) -> None:
    model, processor = load("b")
    model.set_attn_implementation(attention)
    inputs = prompt(processor)
    counted = count_flops(
        model, lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False)
    )
    text = inputs["input_ids"].shape[1] - 144
    expected = estimate(skeleton_of(model.config), visual_tokens=144, text_tokens=text)
    rotary = counted.parts["llm"] - sum(counted.layers.values())
    assert counted.parts["encoder"] + counted.parts["projector"] == expected.encoder_flops
    assert counted.parts["llm"] + counted.parts["head"] - rotary == expected.prefill_flops
    assert counted.parts["selection"] == 0
    assert rotary < 1e-3 * counted.total


def test_reduction_is_counted_in_its_part() -> None:
    model, processor = load("b")
    inputs = prompt(processor)
    whole = count_flops(model, lambda: model(**inputs))
    with tr.attach(model, tr.create_strategy("divprune", keep=18)):
        reduced = count_flops(model, lambda: model(**inputs))
    assert reduced.parts["selection"] > 0
    for part in ("encoder", "projector"):
        assert reduced.parts[part] == whole.parts[part]
    assert reduced.layers[0] == by_hand(model.config, inputs["input_ids"].shape[1] - 144 + 18)
    after = count_flops(model, lambda: model(**inputs))
    assert after == whole


@pytest.mark.parametrize(
    ("backend", "scheme"),
    [
        ("torchao", "int8_weight_only"),
        ("torchao", "int8_dynamic"),
        ("torchao", "intx_weight_only"),
        ("torchao", "float8_weight_only"),
        ("bitsandbytes", "int8"),
        ("bitsandbytes", "nf4"),
    ],
)
def test_quantized_layers_count_as_many_flops(backend: str, scheme: str) -> None:
    pytest.importorskip(backend, reason="needs the extra quant")
    whole, processor = load("b")
    inputs = prompt(processor)
    quantization = {"backend": backend, "scheme": scheme}
    model, _ = load_model(
        tr.ModelSettings(path="testbed:b", dtype="float32", device="cpu", quantization=quantization)
    )
    model(**inputs)
    assert count_flops(model, lambda: model(**inputs)) == count_flops(
        whole, lambda: whole(**inputs)
    )
    parameters, smaller = weigh(whole), weigh(model)
    assert smaller.parameters == parameters.parameters
    linears = sum(
        m.weight.numel() for m in whole.model.language_model.layers.modules() if hasattr(m, "bias")
    )
    bits = 4 if scheme == "nf4" else 8
    saved = parameters.total_bytes - smaller.total_bytes
    stored = linears * 4 - saved
    assert linears * bits / 8 < stored < linears * bits / 8 * 1.15


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.cdist(torch.ones(2, 40, 7), torch.ones(2, 50, 7), p=1), 3 * 2 * 40 * 50 * 7),
        (lambda: torch.linalg.qr(torch.randn(30, 10)), 4 * 30 * 100 - 4 * 1000 // 3),
        (lambda: torch.linalg.cholesky(torch.eye(30)), 30**3 // 3),
        (lambda: torch._int_mm(*(torch.ones(32, 32, dtype=torch.int8),) * 2), 2 * 32**3),
        (
            lambda: nn.functional.scaled_dot_product_attention(*(torch.ones(2, 4, 9, 8),) * 3),
            4 * 2 * 4 * 9 * 9 * 8,
        ),
        (lambda: torch.ones(40, 50).sort(dim=1), 0),
        (lambda: torch.ones(40, 50).softmax(1) * 3, 0),
    ],
)
def test_operators(call: Any, expected: int) -> None:
    assert count_flops(llava().model, call).parts["selection"] == expected


def test_an_unknown_costly_operator_is_an_error() -> None:
    with pytest.raises(UncountedOperator, match="linalg_lu_factor_ex has no FLOP formula"):
        count_flops(llava().model, lambda: torch.linalg.lu_factor(torch.eye(4)))
    assert len(formulas()) > 10
    assert is_costly("acme.fused_moe")
    assert not is_costly("acme.dequantize_rows")
    assert not is_costly("aten.index_select")


def test_a_cache_of_an_unknown_form_is_never_zero() -> None:
    case = llava()
    find_decoder(case.model).config.kv_lora_rank = 8
    with tr.attach(case.model, tr.create_strategy("uniform", keep=4)) as run:
        case.model(**case.batch())
        receipt = run.receipt
    assert receipt.kv_bytes is None
    assert receipt.kv_bytes_saved is None
    assert receipt.as_dict()["kv_bytes"] is None
    assert "KV cache" not in str(receipt)
    assert estimate(case.model, visual_tokens=16, text_tokens=4).kv_bytes is None


# -- from the configuration alone ------------------------------------------------------------------


def big_llava(width: int, inner: int, layers: int, heads: int) -> Any:
    return transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "projection_dim": 768,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": 32064,
            "dtype": "float16",
        },
        image_token_index=32000,
        dtype="float16",
    )


@pytest.mark.parametrize(
    ("config", "teraflops", "mebibytes"),
    [
        (big_llava(4096, 11008, 32, 32), {576: 7.635, 192: 2.506, 128: 1.667, 64: 0.831}, 0.5),
        (big_llava(5120, 13824, 40, 40), {576: 14.888, 192: 4.903, 128: 3.262, 64: 1.628}, 0.78125),
    ],
)
def test_llava_from_its_configuration(
    config: Any, teraflops: dict[int, float], mebibytes: float
) -> None:
    """The figures of docs/cost.md."""
    skeleton = skeleton_of(config)
    cost = language_model_cost(skeleton)
    for keep, expected in teraflops.items():
        stages = as_stages(tr.create_strategy("uniform", keep=keep))
        found = estimate(
            skeleton, stages, visual_tokens=576, text_tokens=0, cost=cost, encoder_flops=0
        )
        text = config.text_config
        head = 2 * text.hidden_size * text.vocab_size
        assert found.prefill_flops == text.num_hidden_layers * by_hand(config, keep) + head
        assert found.prefill_flops / 1e12 == pytest.approx(expected, abs=5e-4)
        assert found.visual_kv_bytes / 2**20 == keep * mebibytes
        assert found.layer_average == keep


def test_the_encoder_of_llava_by_hand() -> None:
    """24 blocks on 577 tokens, the patches, and a projector of two layers: docs/cost.md."""
    config = big_llava(4096, 11008, 1, 32)
    length, width, inner = 577, 1024, 4096
    block = 2 * length * width * (4 * width + 2 * inner) + 4 * length**2 * width
    patches = 2 * 576 * 3 * 14 * 14 * width
    projector = 2 * 576 * (width * 4096 + 4096 * 4096)
    found = image_cost(skeleton_of(config))
    assert found.flops == 24 * block + patches + projector
    assert found.flops / 1e12 == pytest.approx(0.406, abs=5e-4)
    assert found.tokens == 576


def test_tokens_by_layer_of_stages_in_a_row() -> None:
    stages = (
        tr.Stage(reducer=tr.create_strategy("uniform", reduction=2)),
        tr.Stage(reducer=Anywhere(), site="decoder", schedule={1: 0.5, 3: 0.25}),
    )
    assert tokens_by_layer(stages, 64, 4) == (32, 16, 16, 8)
    shares = replace(stages[1], schedule={0.25: 0.5, 0.75: 0.25})
    assert tokens_by_layer((stages[0], shares), 64, 4) == (32, 16, 16, 8)
    assert tokens_by_layer((), 64, 4) == (64,) * 4
    frames = tr.Stage(reducer=tr.create_strategy("uniform", keep=4), site="frames")
    with pytest.raises(UnsupportedSite, match="one image"):
        tokens_by_layer((frames,), 64, 4)
    with pytest.raises(BudgetError, match="on a live model"):
        tokens_by_layer((tr.Stage(reducer=Anywhere(), flops=1e9),), 64, 4)
    with pytest.raises(BudgetError, match="State it at the projector"):
        tr.Stage(reducer=tr.create_strategy("tome"), site="vision", flops=1e9)
    with pytest.raises(BudgetError, match="decides from the data"):
        tokens_by_layer(as_stages(tr.create_strategy("prumerge")), 64, 4)


class Anywhere(tr.Scorer):
    """Runs at every site."""

    def score(self, tokens: tr.VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)


PRUNERS: list[dict[str, Any]] = [
    {"backend": "structured", "mlp_ratio": 0.3},
    {"backend": "structured", "head_ratio": 0.5, "depth_ratio": 0.4},
    {"backend": "torch_pruning", "mlp_ratio": 0.5},
]


@pytest.mark.parametrize("timm", [False, True], ids=["clip", "timm"])
@pytest.mark.parametrize("prune", PRUNERS, ids=["mlp", "heads-depth", "torch-pruning"])
def test_pruned_encoders_cost_what_they_cost_when_loaded(
    prune: dict[str, Any], timm: bool, tmp_path: Path
) -> None:
    if prune["backend"] == "torch_pruning":
        pytest.importorskip("torch_pruning", reason="needs the extra vision")
    path = str(write_timm_llava(tmp_path / "timm")) if timm else "testbed:b"
    model = {"path": path, "dtype": "float32", "device": "cpu", "vision_encoder": {"prune": prune}}
    pipeline = tr.load_pipeline({"model": model, "reduce": [{"strategy": "lftr", "reduction": 8}]})
    mine, base = estimate_both(pipeline, text_tokens=10)
    assert pipeline.model is not None
    loaded, _ = load_model(pipeline.model)
    pixels = torch.zeros(1, 3, 96, 96)
    counted = count_flops(loaded, lambda: loaded.get_image_features(pixels))
    assert mine.visual_tokens == base.visual_tokens == 144
    assert mine.tokens_per_layer == (18,) * 4
    assert mine.encoder_flops == counted.total < base.encoder_flops
    assert mine.parameters == weigh(loaded).total_parameters < base.parameters
    # Also of a live model, whose configuration cannot say how many heads there are.
    assert image_cost(loaded).flops == counted.total


def test_what_is_judged_by_weights_alone_is_not_known_without_them() -> None:
    prune = {"backend": "structured", "mlp_ratio": 0.3, "scope": "encoder"}
    model = {"path": "testbed:b", "device": "cpu", "vision_encoder": {"prune": prune}}
    pipeline = tr.load_pipeline({"model": model, "reduce": [{"strategy": "lftr", "reduction": 8}]})
    with pytest.raises(UnsupportedModel, match="width that its weights earn"):
        estimate_both(pipeline, text_tokens=10)


@pytest.mark.parametrize(("case", "unit", "prefix"), [(llava, 1, 1), (internvl, 4, 1)])
def test_stages_inside_the_encoder_spare_what_is_counted_by_hand(
    case: Any, unit: int, prefix: int
) -> None:
    model = case().model
    whole = image_cost(model)
    tokens = whole.tokens
    stage = tr.Stage(reducer=tr.create_strategy("tome", keep_ratio=0.5), site="vision")
    vision = model.config.vision_config
    width, inner = vision.hidden_size, vision.intermediate_size
    count = vision.num_hidden_layers
    depth = count + 1 + getattr(model.config, "vision_feature_layer", -1)

    def block(left: int) -> int:
        length = prefix + unit * left
        return 2 * length * width * (4 * width + 2 * inner) + 4 * length**2 * width

    cut = tokens - tokens // 2
    entering = [tokens - cut * min(i, depth) // depth for i in range(count)]
    spared = sum(block(tokens) - block(left) for left in entering)
    assert whole.flops - image_cost(model, (stage,)).flops == spared > 0
    found = estimate(model, (stage,), text_tokens=0)
    assert found.tokens_per_layer == (tokens // 2,) * 4
    assert found.visual_tokens == tokens


@pytest.mark.parametrize("case", [onevision, qwen2_5_vl])
def test_encoders_in_tiles_or_of_any_size_are_measured(case: Any) -> None:
    stage = tr.Stage(reducer=tr.create_strategy("tome", keep_ratio=0.5), site="vision")
    with pytest.raises(UnsupportedSite, match="known only of what ran"):
        estimate(case().model, (stage,), visual_tokens=16, text_tokens=0, encoder_flops=0)


def test_encoders_of_any_size_have_no_cost_by_configuration() -> None:
    assert image_cost(llava().model).tokens == 16
    assert image_cost(internvl().model).tokens == 4
    with pytest.raises(UnsupportedModel, match="images of any size"):
        image_cost(qwen2_5_vl().model)


# -- budgets that state a cost ---------------------------------------------------------------------


def test_flops_budgets_are_solved_for_the_most_tokens() -> None:
    case = llava()
    cost = language_model_cost(case.model)
    for kept in (1, 5, 15):
        exact = sum(layer.prefill(kept) for layer in cost.layers)
        for flops, expected in ((exact, kept), (exact + 1, kept), (exact - 1, kept - 1)):
            stage = tr.Stage(reducer=tr.create_strategy("lftr"), flops=flops)
            if expected == 0:
                with (
                    tr.attach(case.model, stage),
                    pytest.raises(BudgetError, match="one token costs"),
                ):
                    case.model(**case.batch())
                continue
            with tr.attach(case.model, stage) as run:
                case.model(**case.batch())
                found = run.receipt.items[0].stages[0]
                assert found.tokens_out == expected
                assert found.spending is not None
                assert found.spending.limit == flops
                assert found.spending.spent == cost.prefill((expected,) * 4) - cost.head
                assert f"flops {found.spending.spent:.4g} of" in str(run.receipt)
                assert run.receipt.as_dict()["items"][0]["stages"][0]["spending"]["unit"] == "flops"


def test_flops_at_a_layer_pay_for_the_layers_before() -> None:
    case = llava()
    cost = language_model_cost(case.model)
    before = sum(layer.prefill(16) for layer in cost.layers[:2])
    after = sum(layer.prefill(4) for layer in cost.layers[2:])
    stage = tr.Stage(reducer=Anywhere(), site="decoder", layer=2, flops=before + after)
    with tr.attach(case.model, stage) as run:
        case.model(**case.batch())
        assert [item.tokens_out for item in run.receipt.items] == [4, 4]


def test_time_budgets_follow_what_was_measured() -> None:
    price = TimePrice(tokens=(1, 10, 20), milliseconds=(1.0, 2.0, 6.0), layers=4)
    assert price(10, 0, None) == 2.0
    assert price(15, 0, None) == 4.0
    assert price(30, 0, None) == 10.0
    assert price(10, 0, 2) == 1.0
    assert price(0, 0, None) == 0.0
    assert tr.Budget(prefill_ms=4.0).solve(100, lambda n: price(n, 0, None)).keep == 15
    case = llava()
    measured = time_prefill(case.model)
    assert list(measured.milliseconds) == sorted(measured.milliseconds)
    generous = tr.Stage(reducer=tr.create_strategy("lftr"), prefill_ms=1e6)
    with tr.attach(case.model, generous) as run:
        case.model(**case.batch())
        assert run.receipt.tokens_out == run.receipt.tokens_in


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flops": 0}, "out of range"),
        ({"prefill_ms": -1}, "out of range"),
        ({"flops": 1e9, "keep": 4}, "two budgets at once"),
        ({"flops": 1e9, "prefill_ms": 4}, "two budgets at once"),
        ({"flops": 1e9, "total": 4}, "two budgets at once"),
        ({"flops": "much"}, "finite number"),
    ],
)
def test_wrong_budgets(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        tr.Budget(**given)


def test_a_cost_needs_a_model() -> None:
    with pytest.raises(BudgetError, match="depends on the model"):
        tr.Budget(flops=1e9).count(576)
    with pytest.raises(BudgetError, match="two budgets at once"):
        tr.Stage(reducer=tr.create_strategy("lftr", keep=4), flops=1e9)
    text = {"reduce": [{"strategy": "lftr", "flops": 1.5e9}]}
    pipeline = tr.load_pipeline(text)
    assert pipeline.stages[0].flops == 1.5e9
    import yaml

    assert tr.load_pipeline(yaml.safe_load(tr.dump_pipeline(pipeline))) == pipeline
    assert pipeline.stages[0].with_budget(keep=4).limit is None


# -- the bench -------------------------------------------------------------------------------------


def test_a_pipeline_beside_the_unmodified_model() -> None:
    prune = {"prune": {"backend": "structured", "mlp_ratio": 0.3}}
    pipeline = tr.load_pipeline(
        {
            "model": {
                "path": "testbed:b",
                "dtype": "float32",
                "device": "cpu",
                "vision_encoder": prune,
            },
            "reduce": [{"strategy": "lftr", "reduction": 8}],
        }
    )
    found = compare(pipeline, prompt, batch_sizes=(1, 2), new_tokens=3, rounds=1)
    mine, base = found.pipeline, found.baseline
    assert mine.weights.total_parameters < base.weights.total_parameters
    assert base.weights.total_parameters == 1675904
    assert mine.flops.parts["encoder"] < base.flops.parts["encoder"]
    assert mine.tokens_per_layer == (18,) * 4
    assert base.layer_average == 144
    assert base.kv_bytes == 8 * mine.kv_bytes
    assert set(mine.times) == set(base.times) == {1, 2}
    assert base.times[1].selection == 0 < mine.times[1].selection
    assert min(min(t.as_dict().values()) for t in mine.times.values()) > 0
    assert json.loads(json.dumps(found.as_dict()))["baseline"]["attention"] == "sdpa"


def test_an_unmodified_model_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    from tokenreduce_integrations.transformers import loading

    original = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *a: calls.append(a) or original(*a))
    pipeline = tr.load_pipeline(
        {
            "model": {"path": "testbed:b", "dtype": "float32", "device": "cpu"},
            "reduce": [{"strategy": "uniform", "reduction": 8}],
        }
    )
    compare(pipeline, prompt, new_tokens=2, rounds=1)
    assert len(calls) == 1


def test_the_fastest_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda: True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert fastest_attention(cuda, torch.bfloat16) == "flash_attention_2"
    assert fastest_attention(cuda, torch.float32) == "sdpa"
    assert fastest_attention(cpu, torch.bfloat16) == "sdpa"


@pytest.mark.parametrize(
    ("mine", "base", "expected"),
    [
        ((1, 2, 3), (0, 9, 3), 1),
        ((5, 2, 3), (0, 3, 5), 3),
        ((5, 2, 3), (0, 2, 3), None),
        ((5, 2, 4), (0, 2, 3), None),
    ],
)
def test_break_even(mine: Any, base: Any, expected: int | None) -> None:
    """(selection, prefill, decode) of the pipeline and of the unmodified model."""
    times = [Times(encoder=1.0, selection=s, prefill=p, decode=d) for s, p, d in (mine, base)]
    assert break_even(*times) == expected


@pytest.mark.parametrize(
    ("mine", "base", "inside", "expected"),
    [
        ((9, 5, 2, 3), (9, 0, 3, 5), False, "takes 5.00 ms and saves 1.00 ms of prefill; it pays"),
        ((9, 1, 5, 3), (9, 0, 3, 3), False, "makes prefill 2.00 ms longer; it never pays off"),
        ((9, 0, 5, 3), (4, 0, 8, 4), True, "makes encoder and prefill 2.00 ms longer; it pays off"),
        ((3, 0, 5, 3), (4, 0, 8, 4), True, ""),
    ],
)
def test_warnings(mine: Any, base: Any, inside: bool, expected: str) -> None:
    """(encoder, selection, prefill, decode) of the pipeline and of the unmodified model."""
    sides = []
    for encoder, selection, prefill, decode in (mine, base):
        times = Times(encoder=encoder, selection=selection, prefill=prefill, decode=decode)
        side = Side(
            weights=Weights(), flops=Flops(), tokens_per_layer=(), kv_bytes=0, times={4: times}
        )
        sides.append(side)
    found = Comparison(
        pipeline=sides[0],
        baseline=sides[1],
        speedup={},
        receipt=Receipt(),
        attention="sdpa",
        inside=inside,
    )
    assert len(found.warnings) == bool(expected)
    assert all(expected in text and text.startswith("batch 4") for text in found.warnings)


def test_numbers_that_cannot_be_benched() -> None:
    reduce = [{"strategy": "uniform", "reduction": 8}]
    with pytest.raises(PipelineError, match="names no model"):
        compare(tr.load_pipeline({"reduce": reduce}), prompt)
    pipeline = tr.load_pipeline({"model": {"path": "testbed:b"}, "reduce": reduce})
    for wrong in ({"new_tokens": 1}, {"rounds": 0}, {"batch_sizes": ()}, {"batch_sizes": (0,)}):
        with pytest.raises(PipelineError, match="a benchmark needs"):
            compare(pipeline, prompt, **wrong)


def test_copies_of_a_prompt_give_the_same_answers() -> None:
    case = qwen2_5_vl()
    whole = case.model(**case.batch()).logits
    twice = case.model(**repeated(case.batch(), 2)).logits
    torch.testing.assert_close(twice, torch.cat([whole, whole]), rtol=1e-4, atol=1e-4)


def test_tied_weights_weigh_once() -> None:
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert weigh(model).total_parameters == sum(p.numel() for p in model.parameters())
