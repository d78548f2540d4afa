"""Presets of the built-in strategies: complete stages that reproduce the authors' code."""

import pytest
import torch

import tokenreduce as tr
from tokenreduce.plugins import installed
from tokenreduce_strategies.visionzip import zip_tokens

PRESETS = [
    f"{record.name}@{preset}"
    for record in installed().strategies.values()
    for preset in record.presets
]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_stage(preset):
    (stage,) = tr.load_pipeline(preset).stages
    name, _, own = preset.partition("@")
    assert stage.reducer.name == name
    if stage.schedule is None:
        assert tr.create_strategy(name, preset=own) == stage.reducer


def test_all_that_have_an_option_for_official_code_have_a_preset():
    for name in tr.list_strategies():
        record = tr.strategy_info(name)
        if hasattr(installed().strategies.resolve(name), "official"):
            assert any(own.get("official") for own in record.presets.values()), name


def test_visionzip_counts_the_class_token(parity_case):
    case = parity_case("visionzip/n576_d53_c10")
    attention, keys = case.inputs["cls_attention"].sum(1), case.inputs["keys"][:, 1:]
    tokens = tr.VisualTokens.from_grid(
        case.inputs["hidden_states"][:, 1:],
        (24, 24),
        signals={"class_attention": attention, "keys": keys},
    )
    official = tr.create_strategy("visionzip", preset="official-64")(tokens)
    assert official.positions.equal(zip_tokens(attention, keys, **case.parameters).positions)
    # The recorded numbering begins with the class token, which is one of the 64.
    dominant = case.expected["kept_indices_sorted"][0, 1:] - 1
    assert bool(torch.isin(dominant, official.positions[0]).all())
    assert official.kept == 63
    assert tr.create_strategy("visionzip", keep=64)(tokens).kept == 64


def test_dart_keeps_60_where_64_were_asked(parity_case):
    case = parity_case("dart/n576_r0_889")
    states, keys = case.inputs["hidden_states"], case.inputs["keys"].transpose(0, 1).flatten(1)
    start = case.parameters["image_start"]
    image, text = slice(start, start + 576), slice(start + 576, None)
    tokens = tr.VisualTokens.from_grid(
        states[None, image],
        (24, 24),
        signals={
            "decoder_keys": keys[None, image],
            "prompt_keys": keys[None, text],
            "prompt_states": states[None, text],
        },
    )
    kept = tr.create_strategy("dart", preset="official-64")(tokens).kept
    assert kept == len(case.expected["kept_indices"]) == 60
