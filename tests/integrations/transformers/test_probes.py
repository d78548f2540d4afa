"""Signals read while the tower runs equal those of eager attention, token by token of the LLM."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface

import tokenreduce as tr
from support import recorder
from support.tiny_joint import llm_tokenizer, tiny_clip, tiny_siglip
from support.tiny_models import (
    CASES,
    IMAGE,
    TEXT,
    VIDEO,
    Case,
    lively,
    llava,
    llava_next,
    onevision,
)
from support.tower_oracle import expected, image_tower_patches
from tokenreduce.errors import AttachmentError, MissingSignal, TokensError
from tokenreduce.plugins import installed
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.adapters import TransformersAdapter

PER_PATCH = ("vision_features", "received_attention", "keys", "queries")
WITH_CLASS_TOKEN = (*PER_PATCH, "class_attention", "shallow_class_attention")


def llava_dinov2(side: str = "left") -> Case:
    """LLaVA with a DINOv2 tower."""
    case = llava(side)
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "dinov2",
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=-2,
    )
    return Case(lively(transformers.LlavaForConditionalGeneration(config)), case.inputs, case.items)


OFFERED = {
    "llava": WITH_CLASS_TOKEN,
    "llava-several-images": WITH_CLASS_TOKEN,
    "llava-dinov2": WITH_CLASS_TOKEN,
    "llava-next": WITH_CLASS_TOKEN,
    "internvl": WITH_CLASS_TOKEN,
    "onevision": PER_PATCH,
    "qwen2-vl": PER_PATCH,
    "qwen2.5-vl": PER_PATCH,
    "qwen3-vl": PER_PATCH,
}
#: Mosaics of tiles are no full grids.
MOSAICS = ("llava-next", "onevision", "internvl")
JOINT_ENCODERS = {"llava": tiny_clip, "llava-next": tiny_clip, "onevision": tiny_siglip}
FAMILIES = ("llava", "llava-next", "onevision", "internvl", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
BUILD = {**CASES, "llava-dinov2": llava_dinov2}


@pytest.fixture
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    status = installed().load("recorder", recorder)
    assert status.state == "loaded", status.error
    recorder.SEEN.clear()
    yield recorder.SEEN
    installed().strategies.remove("recorder")


def hooks_of(model: Any) -> list[Any]:
    return [
        (module, dict(module._forward_hooks), dict(module._forward_pre_hooks), vars(module).copy())
        for module in model.modules()
    ]


@pytest.mark.parametrize("name", OFFERED)
@torch.no_grad()
def test_signals_equal_those_of_eager_attention(
    name: str, recorded: dict[str, list[Tensor]]
) -> None:
    case = BUILD[name]()
    # transformers puts hooks of its own on towers when they run first.
    case.model(**case.batch())
    before = hooks_of(case.model)
    recording = tr.create_strategy("recorder", keep=2, names=OFFERED[name])
    with tr.attach(case.model, recording):
        case.model(**case.batch())
        assert case.model.config._attn_implementation == "sdpa"
    for module, hooks, pre_hooks, attributes in before:
        assert dict(module._forward_hooks) == hooks
        assert dict(module._forward_pre_hooks) == pre_hooks
        assert vars(module).keys() == attributes.keys()
        assert vars(module).get("config") is attributes.get("config")
    oracle = expected(name, case)
    assert recorded.keys() == set(OFFERED[name])
    for signal in OFFERED[name]:
        # Strategies are not asked about newlines.
        chosen = [
            [row for row in range(len(item.coords)) if row not in item.protected]
            for item in case.items
        ]
        whole = zip(oracle[signal], chosen, recorded[signal], strict=True)
        for own, rows, got in whole:
            assert own[rows].shape == got.shape, signal
            assert (own[rows] - got).abs().max() < 1e-5, signal


def read_signals(
    family: families.Family, case: Case, names: list[str], **given: Any
) -> list[dict[str, Tensor]]:
    """Signals of the images of one encoding call, newlines included."""
    owner = case.model.model
    assert family.probe is not None
    probe = family.probe(owner, names, None)
    probe.begin()
    features = owner.get_image_features(**given).pooler_output
    signals = probe.read("image", features, given)
    probe.detach()
    return signals


@torch.no_grad()
def test_newlines_have_no_attention() -> None:
    case = llava_next()
    given = {name: case.inputs[name] for name in ("pixel_values", "image_sizes")}
    found = read_signals(families.LLAVA_NEXT, case, ["class_attention", "keys"], **given)
    oracle = expected("llava-next", case)
    for index, signals in enumerate(found):
        for name, signal in signals.items():
            assert (signal - oracle[name][index]).abs().max() < 1e-5
            assert not signal[list(case.items[index].protected)].any()


@torch.no_grad()
def test_images_that_are_left_whole() -> None:
    case = onevision()
    pixels, sizes = case.inputs["pixel_values"], case.inputs["image_sizes"]
    given = {"pixel_values": pixels, "image_sizes": sizes, "batch_num_images": torch.tensor([2])}
    found = read_signals(families.LLAVA_ONEVISION, case, ["received_attention"], **given)
    oracle = image_tower_patches(case.model, pixels[:, 0])["received_attention"]
    for signals, own in zip(found, oracle, strict=True):
        assert (signals["received_attention"][:-1] - own).abs().max() < 1e-5
        assert signals["received_attention"][-1] == 0


@pytest.mark.parametrize("name", OFFERED)
def test_what_is_offered_is_what_can_be_read(name: str) -> None:
    case = BUILD[name]()
    wrong = set(WITH_CLASS_TOKEN) - set(OFFERED[name])
    for missing in wrong:
        needy = recorder.Recorder(keep=2, names=(missing,))
        with pytest.raises(MissingSignal, match=f"{missing!r}.*What would work: .*divprune"):
            tr.attach(case.model, needy)


@torch.no_grad()
def test_only_what_is_needed_is_captured() -> None:
    case = llava()
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep=4)):
        assert not case.model.model.multi_modal_projector._forward_pre_hooks
        for layer in case.model.model.vision_tower.encoder.layers:
            assert layer.self_attn.config is case.model.model.vision_tower.config
    with tr.attach(case.model, tr.create_strategy("fastervlm", keep=4)):
        assert not case.model.model.multi_modal_projector._forward_pre_hooks
        observed = [
            layer.self_attn.config is not case.model.model.vision_tower.config
            for layer in case.model.model.vision_tower.encoder.layers
        ]
        assert observed == [False, True, False]


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_signals_follow_features_through_generate_and_beams(
    name: str, beams: int, recorded: dict[str, list[Tensor]]
) -> None:
    case = CASES[name]()
    recording = tr.create_strategy("recorder", keep=2, names=("received_attention",))
    with tr.attach(case.model, recording):
        case.model.generate(**case.batch(), max_new_tokens=2, do_sample=False, num_beams=beams)
    oracle = expected(name, case)["received_attention"]
    whole = [
        (item, signal)
        for token in (IMAGE, VIDEO)
        for prompt in range(2)
        for _ in range(beams)
        for item, signal in zip(case.items, oracle, strict=True)
        if (item.token, item.prompt) == (token, prompt)
    ]
    assert len(whole) == len(recorded["received_attention"]) == beams * len(case.items)
    for (item, own), got in zip(whole, recorded["received_attention"], strict=True):
        rows = [row for row in range(len(item.coords)) if row not in item.protected]
        assert (own[rows] - got).abs().max() < 1e-5


@torch.no_grad()
def test_kernels_that_take_bounds_give_the_same_signals(
    recorded: dict[str, list[Tensor]],
) -> None:
    def kernel(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention as FlashAttention is called: all segments at once, with their bounds."""
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        outputs = [nn.functional.scaled_dot_product_attention(*part) for part in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    AttentionInterface.register("flash_kernel_of_a_test", kernel)
    case = CASES["qwen2.5-vl"]()
    case.model.model.visual.config._attn_implementation_internal = "flash_kernel_of_a_test"
    strategy = tr.create_strategy("recorder", keep=2, names=("received_attention", "keys"))
    with tr.attach(case.model, strategy):
        case.model(**case.batch())
    oracle = expected("qwen2.5-vl", CASES["qwen2.5-vl"]())
    for name in recorded:
        for own, got in zip(oracle[name], recorded[name], strict=True):
            assert (own - got).abs().max() < 1e-5


@torch.no_grad()
def test_half_precision_keeps_attention_in_full(recorded: dict[str, list[Tensor]]) -> None:
    case = llava_next()
    case.model.bfloat16()
    case.inputs["pixel_values"] = case.inputs["pixel_values"].bfloat16()
    with tr.attach(case.model, tr.create_strategy("recorder", keep=2, names=WITH_CLASS_TOKEN)):
        case.model(**case.batch())
    oracle = expected("llava-next", case)
    for name in ("class_attention", "received_attention"):
        assert recorded[name][0].dtype == torch.float32
        rows = [row for row in range(88) if row not in case.items[0].protected]
        assert (oracle[name][0][rows].float() - recorded[name][0]).abs().max() < 4e-3
    assert recorded["keys"][0].dtype == torch.bfloat16


@torch.no_grad()
def test_shallow_attention_shares_a_budget_among_tiles() -> None:
    case = llava_next()
    reducer = tr.create_strategy("hired", keep=24, shallow="shallow_class_attention")
    with tr.attach(case.model, reducer) as run:
        case.model(**case.batch())
    stages = [item.stages[0] for item in run.receipt.items]
    assert [stage.tokens_out - stage.protected for stage in stages] == [24, 24]


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl"])
@torch.no_grad()
def test_threads_share_a_model(name: str) -> None:
    case = CASES[name]()
    strategy = recorder.Recorder(keep=2, names=("received_attention",))
    with tr.attach(case.model, strategy):
        expected_logits = case.model(**case.batch()).logits
        same: list[bool] = []

        def ask() -> None:
            with torch.no_grad():
                for _ in range(4):
                    same.append(torch.equal(case.model(**case.batch()).logits, expected_logits))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert same == [True] * 8


@torch.no_grad()
def test_a_call_that_failed_leaves_nothing_behind(recorded: dict[str, list[Tensor]]) -> None:
    case = llava()
    recording = tr.create_strategy("recorder", keep=4, names=("received_attention",))
    with tr.attach(case.model, recording):
        projector = case.model.model.multi_modal_projector
        handle = projector.register_forward_pre_hook(lambda _, args: args[0].no_such_attribute)
        with pytest.raises(AttributeError, match="no_such_attribute"):
            case.model(**case.batch())
        handle.remove()
        case.model(**case.batch())
    assert [len(rows) for rows in recorded["received_attention"]] == [16, 16]


@torch.no_grad()
def test_a_tower_that_was_replaced_is_reported() -> None:
    case = llava()
    with tr.attach(case.model, tr.create_strategy("fastervlm", keep=4)) as run:
        first, layer, _ = case.model.model.vision_tower.encoder.layers
        own, layer.self_attn = layer.self_attn, copy.deepcopy(first.self_attn)
        with pytest.raises(AttachmentError, match="replaced or compiled"):
            case.model(**case.batch())
        layer.self_attn = own
        case.model(**case.batch())
        assert [item.tokens_out for item in run.receipt.items] == [4, 4]


def test_features_encoded_before_attaching_carry_no_signals(
    recorded: dict[str, list[Tensor]],
) -> None:
    case = llava()
    batch = case.batch()
    with torch.no_grad():
        pixels = batch.pop("pixel_values")
        encoded = {"image": case.model.model.get_image_features(pixels, return_dict=True)}
        run = tr.attach(case.model, tr.create_strategy("recorder", keep=4))
        with run, pytest.raises(MissingSignal, match="not encoded while"):
            case.model(**batch, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("strategy", ["norm-topk", "fastervlm", "greedyprune"])
def test_encoding_once_serves_many_questions(strategy: str) -> None:
    case = llava()
    reducer = tr.create_strategy(strategy, keep=4)
    with tr.attach(case.model, reducer) as run, torch.no_grad():
        once = case.model(**case.batch()).logits
        batch = case.batch()
        pixels = batch.pop("pixel_values")
        encoded = {"image": case.model.model.get_image_features(pixels, return_dict=True)}
        for _ in range(2):
            assert torch.equal(case.model(**batch, mm_encoder_outputs=dict(encoded)).logits, once)
            assert run.reductions[0].layout.grid == (1, 4, 4)


def signal_strategies() -> list[str]:
    """Built-in strategies at the projector site that read more than projected features."""
    return [
        name
        for name, record in installed().strategies.items()
        if record.needs and "projector" in record.sites
    ]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_strategies_run_on_every_family_that_offers_their_signals(name: str) -> None:
    case = CASES[name]()
    offered = {*OFFERED[name], "prompt_embeddings"}
    given: dict[str, Any] = {"processor": llm_tokenizer()}
    if name in JOINT_ENCODERS:
        offered |= {"joint_image_embeddings", "joint_text_embeddings"}
        given["joint_encoder"] = JOINT_ENCODERS[name]()
    ran = []
    for strategy in signal_strategies():
        reducer = tr.create_strategy(strategy, keep_ratio=0.5)
        if not offered.issuperset(reducer.needs):
            with pytest.raises(MissingSignal):
                tr.attach(case.model, reducer, **given)
            continue
        with tr.attach(case.model, reducer, **given) as run:
            if name in MOSAICS and reducer.record.needs_grid:
                with pytest.raises(TokensError, match=f"{strategy} needs tokens that form a full"):
                    case.model(**case.batch())
                continue
            case.model(**case.batch())
            assert run.receipt.sequence_out < run.receipt.sequence_in, strategy
        ran.append(strategy)
    assert "greedyprune" in ran
    assert ("fastervlm" in ran) == ("class_attention" in offered)
    assert ("cdpruner" in ran) == (name in JOINT_ENCODERS)


def test_the_generic_adapter_reads_the_prompt_only() -> None:
    case = onevision()
    TransformersAdapter().check(
        case.model, (tr.Stage(reducer=tr.create_strategy("greedyprune", keep=4)),)
    )
    with pytest.raises(MissingSignal, match=r"it gives prompt_embeddings"):
        TransformersAdapter().check(
            case.model, (tr.Stage(reducer=tr.create_strategy("fastervlm", keep=4)),)
        )
