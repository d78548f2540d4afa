"""Signals of the prompt, and of the space that a vision-text encoder shares with text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import tokenreduce as tr
from support import recorder
from support.tiny_joint import TEXT_LENGTH, clip_with, llm_tokenizer, tiny_clip, tiny_siglip
from support.tiny_models import BOS, CASES, IMAGE, PAD, VIDEO, Case, llava, qwen2_vl
from support.tower_oracle import expected
from tokenreduce.errors import MissingSignal, PipelineError
from tokenreduce.plugins import installed
from tokenreduce_integrations.testbed.examples import example_image, prompt
from tokenreduce_integrations.testbed.models import model_path
from tokenreduce_integrations.transformers.joint import JointEncoder

JOINT = ("joint_image_embeddings", "joint_text_embeddings")
SPECIAL = (PAD, BOS, IMAGE, VIDEO)


@pytest.fixture
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    status = installed().load("recorder", recorder)
    assert status.state == "loaded", status.error
    recorder.SEEN.clear()
    yield recorder.SEEN
    installed().strategies.remove("recorder")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    model, tokenizer = tiny_clip()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_ids(case: Case, row: int, *, special: bool) -> list[int]:
    """The text of a prompt, read token by token."""
    ids = []
    for token, real in zip(
        case.inputs["input_ids"][row].tolist(),
        case.inputs["attention_mask"][row].tolist(),
        strict=True,
    ):
        if real and token not in (IMAGE, VIDEO) and (special or token not in SPECIAL):
            ids.append(token)
    return ids


@pytest.mark.parametrize("with_processor", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_prompt_embeddings_are_those_of_its_text(
    name: str, side: str, with_processor: bool, recorded: dict[str, list[Tensor]]
) -> None:
    case = CASES[name](side)
    recording = tr.create_strategy("recorder", keep=2, names=("prompt_embeddings",))
    processor = llm_tokenizer() if with_processor else None
    with tr.attach(case.model, recording, processor=processor):
        case.model(**case.batch())
    embed = case.model.get_input_embeddings()
    assert len(recorded["prompt_embeddings"]) == len(case.items)
    for item, got in zip(case.items, recorded["prompt_embeddings"], strict=True):
        ids = text_ids(case, item.prompt, special=not with_processor)
        assert torch.equal(got, embed(torch.tensor(ids)))


@torch.no_grad()
def test_prompts_follow_generate_beams_and_features_encoded_once(
    recorded: dict[str, list[Tensor]],
) -> None:
    case = llava()
    recording = tr.create_strategy("recorder", keep=2, names=("prompt_embeddings",))
    with tr.attach(case.model, recording):
        case.model.generate(**case.batch(), max_new_tokens=2, do_sample=False, num_beams=2)
        embed = case.model.get_input_embeddings()
        for row, got in enumerate(recorded["prompt_embeddings"]):
            ids = text_ids(case, row // 2, special=True)
            assert torch.equal(got, embed(torch.tensor(ids)))
        recorded.clear()
        batch = case.batch()
        pixels = batch.pop("pixel_values")
        encoded = {"image": case.model.model.get_image_features(pixels, return_dict=True)}
        other = batch["input_ids"].clone()
        other[other > 20] += 1
        other.clamp_(max=199)
        for ids in (batch["input_ids"], other):
            batch["input_ids"] = ids
            case.model(**batch, mm_encoder_outputs=dict(encoded))
    first, second = recorded["prompt_embeddings"][::2]
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def patches_in_joint_space(encoder: Any, states: Tensor) -> Tensor:
    """As TRIM and CDPruner embed them, one patch at a time where there is a pooling head."""
    normed = encoder.vision_model.post_layernorm(states)
    if hasattr(encoder, "visual_projection"):
        projected: Tensor = encoder.visual_projection(normed)
        return projected
    rows = [encoder.vision_model.head(patch[None, None])[0] for patch in normed]
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("name", "build"), [("llava", tiny_clip), ("llava-next", tiny_clip), ("onevision", tiny_siglip)]
)
@torch.no_grad()
def test_joint_embeddings_equal_those_of_the_encoder(
    name: str, build: Any, recorded: dict[str, list[Tensor]]
) -> None:
    case, (encoder, tokenizer) = CASES[name](), build()
    recording = tr.create_strategy("recorder", keep=2, names=(*JOINT, "vision_features"))
    with tr.attach(
        case.model, recording, processor=llm_tokenizer(), joint_encoder=(encoder, tokenizer)
    ):
        case.model(**case.batch())
    oracle = expected(name, case)["vision_features"]
    for item, states, image in zip(
        case.items, oracle, recorded["joint_image_embeddings"], strict=True
    ):
        rows = [row for row in range(len(item.coords)) if row not in item.protected]
        if item.token == IMAGE:
            own = patches_in_joint_space(encoder, states[rows])
            assert (own - image).abs().max() < 1e-5
        else:
            # Frames are pooled: embeddings are, not states.
            assert image.shape == (len(rows), 32)
    room = TEXT_LENGTH - 2
    for item, text in zip(case.items, recorded["joint_text_embeddings"], strict=True):
        words = text_ids(case, item.prompt, special=False)
        parts = [words[i : i + room] for i in range(0, len(words), room)]
        assert len(text) == len(parts)
        for part, got in zip(parts, text, strict=True):
            ids = [1, *part, 2] + [PAD] * (room - len(part))
            mask = [1] * (len(part) + 2) + [0] * (room - len(part))
            own = encoder.get_text_features(torch.tensor([ids]), torch.tensor([mask]))
            assert (own.pooler_output[0] - got).abs().max() < 1e-5


@pytest.mark.parametrize("strategy", ["trim", "cdpruner"])
@torch.no_grad()
def test_an_encoder_is_loaded_by_folder(strategy: str, clip_folder: Path) -> None:
    case = llava()
    reducer = tr.create_strategy(strategy, keep=4)
    logits = []
    for source in (str(clip_folder), tiny_clip()):
        with tr.attach(case.model, reducer, processor=llm_tokenizer(), joint_encoder=source) as run:
            logits.append(case.model(**case.batch()).logits)
            assert [item.tokens_out for item in run.receipt.items] == [4, 4]
    assert torch.equal(*logits)


def test_an_encoder_that_no_stage_needs_is_not_loaded() -> None:
    case = llava()
    reducer = tr.create_strategy("norm-topk", keep=4)
    with tr.attach(case.model, reducer, joint_encoder="/no/such/folder"):
        pass


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, "Pass joint_encoder='openai/clip-vit-large-patch14-336' and processor=processor"),
        ({"joint_encoder": "anything"}, "Pass processor=processor to attach"),
        ({"processor": llm_tokenizer()}, "Pass joint_encoder='openai/.*336' to attach"),
    ],
)
def test_what_is_missing_is_named(given: dict[str, Any], asked: str) -> None:
    with pytest.raises(MissingSignal, match=asked):
        tr.attach(llava().model, tr.create_strategy("trim", keep=4), **given)


def test_towers_of_no_joint_space_are_refused() -> None:
    reducer = tr.create_strategy("cdpruner", keep=4)
    with pytest.raises(MissingSignal, match=r"cannot be captured .*What would work: .*greedyprune"):
        tr.attach(qwen2_vl().model, reducer, processor=llm_tokenizer(), joint_encoder=tiny_clip())


def test_an_encoder_of_another_tower_is_refused() -> None:
    reducer = tr.create_strategy("cdpruner", keep=4)
    with pytest.raises(MissingSignal, match=r"not that of the joint encoder .*siglip_vision_model"):
        tr.attach(llava().model, reducer, processor=llm_tokenizer(), joint_encoder=tiny_siglip())
    own, other = tiny_clip()[0].config.vision_config, tiny_clip()[0].config.vision_config.to_dict()
    for name in ("patch_size", "num_hidden_layers"):
        changed = type(own)(**{**other, name: 1})
        with pytest.raises(MissingSignal, match=name):
            JointEncoder.require_same_tower(own, changed)


@pytest.mark.parametrize("source", ["/no/such/folder", 3, ""])
def test_an_encoder_that_is_not_there_is_refused(source: Any) -> None:
    reducer = tr.create_strategy("cdpruner", keep=4)
    with pytest.raises(PipelineError, match="joint_encoder"):
        tr.attach(llava().model, reducer, processor=llm_tokenizer(), joint_encoder=source)


def test_something_else_is_no_encoder(tmp_path: Path) -> None:
    llava().model.config.text_config.save_pretrained(tmp_path)
    reducer = tr.create_strategy("cdpruner", keep=4)
    with pytest.raises(PipelineError, match="no vision-text encoder"):
        tr.attach(llava().model, reducer, processor=llm_tokenizer(), joint_encoder=str(tmp_path))


@torch.no_grad()
def test_a_prompt_without_text_is_refused() -> None:
    case = llava()
    batch = case.batch()
    image = batch["input_ids"] == IMAGE
    batch["input_ids"] = batch["input_ids"][image].view(2, -1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    reducer = tr.create_strategy("greedyprune", keep=4)
    with (
        tr.attach(case.model, reducer),
        pytest.raises(MissingSignal, match="prompt 0 has no text"),
    ):
        case.model(**batch)


@torch.no_grad()
def test_embeddings_instead_of_ids_have_no_words() -> None:
    case = llava()
    batch = case.batch()
    batch["inputs_embeds"] = case.model.get_input_embeddings()(batch.pop("input_ids"))
    with tr.attach(case.model, tr.create_strategy("greedyprune", keep=4)) as run:
        case.model(**batch)
        assert [item.tokens_out for item in run.receipt.items] == [4, 4]
    reducer = tr.create_strategy("cdpruner", keep=4)
    with (
        tr.attach(case.model, reducer, processor=llm_tokenizer(), joint_encoder=tiny_clip()),
        pytest.raises(MissingSignal, match="Call it with input_ids"),
    ):
        case.model(**batch)


def test_a_pipeline_names_its_encoder(tmp_path: Path) -> None:
    testbed = json.loads((model_path("b") / "config.json").read_text())
    for part in clip_with(testbed["vision_config"]):
        part.save_pretrained(tmp_path / "clip")
    model_settings = {"path": "testbed:b", "dtype": "float32", "device": "cpu"}
    description = {"model": model_settings, "reduce": [{"strategy": "cdpruner", "keep": 4}]}
    with pytest.raises(MissingSignal, match=r"model\.joint_encoder"):
        tr.load_pipeline(description).build()
    model_settings["joint_encoder"] = str(tmp_path / "clip")
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(description))
    model, processor, run = tr.load_pipeline(file).build()
    inputs = processor(images=example_image(), text=prompt("how many?"), return_tensors="pt")
    with run, torch.no_grad():
        model(**inputs)
        assert [item.tokens_out for item in run.receipt.items] == [4]
    model_settings["joint_encoder"] = ""
    with pytest.raises(PipelineError, match="joint_encoder must be"):
        tr.load_pipeline(description)
