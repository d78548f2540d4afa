"""Signals read while the tower runs equal those of the tower under eager attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import tokenreduce as tr
from support import recorder
from support.tiny_models import llava, onevision
from tokenreduce.errors import MissingSignal
from tokenreduce.plugins import installed

NAMES = ("vision_features", "class_attention", "received_attention", "keys", "queries")


@pytest.fixture
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    status = installed().load("recorder", recorder)
    assert status.state == "loaded", status.error
    recorder.SEEN.clear()
    yield recorder.SEEN
    installed().strategies.remove("recorder")


def test_signals_equal_those_of_eager_attention(recorded: dict[str, list[Tensor]]) -> None:
    case = llava()
    with tr.attach(case.model, tr.create_strategy("recorder", keep=4)), torch.no_grad():
        case.model(**case.batch())
        assert case.model.model.vision_tower.config._attn_implementation == "sdpa"
    tower = case.model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(case.inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    attention = out.attentions[-2].mean(1)
    layer = tower.encoder.layers[-2]
    states = layer.layer_norm1(out.hidden_states[-3])
    expected = {
        "vision_features": out.hidden_states[-2][:, 1:],
        "class_attention": attention[:, 0, 1:],
        "received_attention": attention.mean(1)[:, 1:],
        "keys": layer.self_attn.k_proj(states)[:, 1:],
        "queries": layer.self_attn.q_proj(states)[:, 1:],
    }
    for name in NAMES:
        assert (torch.cat(recorded[name]) - expected[name]).abs().max() < 1e-5, name


def test_signals_follow_features_through_generate_and_beams(
    recorded: dict[str, list[Tensor]],
) -> None:
    case = llava()
    with tr.attach(case.model, tr.create_strategy("recorder", keep=4)) as run, torch.no_grad():
        case.model.generate(**case.batch(), max_new_tokens=2, do_sample=False, num_beams=2)
        assert [item.tokens_out for item in run.receipt.items] == [4] * 4
    attention = torch.cat(recorded["class_attention"])
    assert torch.equal(attention[0], attention[1])
    assert not torch.equal(attention[0], attention[2])
    assert not case.model.model.multi_modal_projector._forward_pre_hooks


def test_a_tower_without_a_class_token_gives_no_class_attention(
    recorded: dict[str, list[Tensor]],
) -> None:
    case = onevision()
    with pytest.raises(MissingSignal, match="class_attention"):
        tr.attach(case.model, tr.create_strategy("recorder", keep=4))


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


def test_encoding_once_serves_many_questions() -> None:
    case = llava()
    reducer = tr.create_strategy("norm-topk", keep=4)
    with tr.attach(case.model, reducer) as run, torch.no_grad():
        expected = case.model(**case.batch()).logits
        batch = case.batch()
        pixels = batch.pop("pixel_values")
        encoded = {"image": case.model.model.get_image_features(pixels, return_dict=True)}
        for _ in range(2):
            assert torch.equal(
                case.model(**batch, mm_encoder_outputs=dict(encoded)).logits, expected
            )
            assert run.reductions[0].layout.grid == (1, 4, 4)
