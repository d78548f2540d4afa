"""What the families that vLLM serves give and take, told without vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support import served_checkpoints
from tokenreduce.errors import ServingError, TokenReduceError
from tokenreduce.plugins import installed
from tokenreduce_integrations.vllm.families import FAMILIES, Block, Processed, Shape, mosaic
from tokenreduce_integrations.vllm.settings import ServedStage

LLAVA = FAMILIES["TokenReduceLlavaForConditionalGeneration"]
QWEN = FAMILIES["TokenReduceQwen2_5_VLForConditionalGeneration"]
NEEDY = ServedStage.from_config({"strategy": "fastervlm", "reduction": 4})


def config(name: str) -> Any:
    return served_checkpoints.FAMILIES[name].config()


@pytest.mark.parametrize("name", served_checkpoints.FAMILIES)
def test_every_checkpoint_has_its_family(name: str) -> None:
    import transformers

    mapping = transformers.AutoModelForImageTextToText._model_mapping
    family = FAMILIES[f"TokenReduce{mapping[type(config(name))].__name__}"]
    assert "image" in family.shapes
    deep = family.tower.deep(config(name))
    depth = getattr(config(name).vision_config, "num_hidden_layers", None)
    assert -1 <= deep < (depth or config(name).vision_config.depth)


def test_towers_with_a_class_token_give_its_attention() -> None:
    LLAVA.require(NEEDY, config("llava"))
    with pytest.raises(ServingError, match=r"'class_attention'.*What would work: .*divprune"):
        QWEN.require(NEEDY, config("qwen2.5-vl"))


def test_workers_that_encode_other_pictures_have_no_signals_of_all() -> None:
    with pytest.raises(ServingError, match="class_attention"):
        LLAVA.require(NEEDY, config("llava"), sharded_pictures=True)
    LLAVA.require(
        ServedStage.from_config({"strategy": "divprune", "reduction": 4}),
        config("llava"),
        sharded_pictures=True,
    )


def test_a_stage_for_clips_alone_would_do_nothing_on_a_model_of_pictures() -> None:
    clips = {"strategy": "divprune", "reduction": 4, "modalities": ["video"]}
    QWEN.require(ServedStage.from_config(clips), config("qwen2.5-vl"))
    with pytest.raises(ServingError, match="nothing would be"):
        LLAVA.require(ServedStage.from_config(clips), config("llava"))


def test_weights_of_another_width_stop_the_server(tmp_path: Path) -> None:
    width = config("llava").text_config.hidden_size
    sizes = {"semantic_tokens": (40, 6), "query.weight": (8, 6)}
    for channels in (width, width // 2):
        file = tmp_path / f"{channels}.safetensors"
        shapes = {**sizes, "key.weight": (8, channels)}
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, file)
        stage = ServedStage.from_config(
            {"strategy": "token-grouping", "weights": str(file), "keep": 9}
        )
        if channels == width:
            LLAVA.require(stage, config("llava"))
            continue
        with pytest.raises(ServingError, match=rf"tokens of {width} channels.*key\.weight"):
            LLAVA.require(stage, config("llava"))


@pytest.mark.parametrize("name", installed().strategies)
def test_what_can_be_served_passes_the_rehearsal(name: str) -> None:
    try:
        stage = ServedStage.from_config({"strategy": name, "keep": 9})
    except TokenReduceError:
        return
    if LLAVA.signals(config("llava")).issuperset(stage.needs):
        LLAVA.require(stage, config("llava"))


@pytest.mark.parametrize("named", ["image_sizes", "image_embeds"])
def test_pictures_that_are_laid_out_otherwise_are_lines(named: str) -> None:
    fields = {named: SimpleNamespace(data=SimpleNamespace(tolist=lambda: [84, 168]))}
    given = Processed(info=_info(), fields=fields, tokens=36 + 6 * 13)
    expected = Shape.line(114)
    if named == "image_sizes":
        expected = Shape(
            blocks=(Block(rows=6, columns=6), Block(rows=6, columns=12, newlines="rows"))
        )
    assert mosaic(given) == expected


def _info() -> Any:
    """What a processor of LLaVA-NeXT knows of its model."""
    encoder = SimpleNamespace(get_patch_grid_length=lambda: 6, get_image_size=lambda: 84)
    return SimpleNamespace(
        get_vision_encoder_info=lambda: encoder,
        get_hf_config=lambda: config("llava-next"),
        _get_num_unpadded_features=lambda **kwargs: (72, 6),
    )
