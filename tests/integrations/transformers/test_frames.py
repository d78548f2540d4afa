"""Choosing frames before the encoder, against encoding the chosen frames alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenreduce as tr
from support import reference, tiny_models
from support.reducers import Chooses, EveryOther, UnevenRandom
from support.reference import ReducedPrompt
from support.tiny_families import TINY
from support.tiny_models import BOS, IMAGE, VIDEO, Case, Item, grid, noise, pad, words
from tokenreduce.errors import (
    AttachmentError,
    BudgetError,
    MissingSignal,
    StageNotEngaged,
    UnsupportedSite,
)

STEPS = 4
SIDE = 8


def frames(reducer: tr.Reducer) -> tr.Stage:
    return tr.Stage(reducer=reducer, site="frames")


# -- models with two clips and an image --------------------------------------------------------


def onevision() -> Case:
    """Two clips of five frames, and an image."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 88, *words(2, 2), *[VIDEO] * 21, *words(3, 9)],
            [BOS, *words(2, 3), *[VIDEO] * 21, *words(2, 4)],
        ],
        "left",
    )
    inputs["pixel_values"] = noise(1, 5, 3, 56, 56)
    inputs["image_sizes"] = torch.tensor([[112, 112]])
    inputs["pixel_values_videos"] = noise(2, 5, 3, 56, 56, seed=2)
    stock = tiny_models.onevision()
    clip = [*grid(5, 2, 2), (0, 4, 1, 2)]
    items = (stock.items[0], Item(0, VIDEO, clip, (20,)), Item(1, VIDEO, clip, (20,)))
    return Case(stock.model, inputs, items)


def llava_next_video() -> Case:
    """Two clips of five frames, and a tiled image."""
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * 88, *words(2, 2), *[VIDEO] * 20, *words(3, 9)],
            [BOS, *words(2, 3), *[VIDEO] * 20, *words(2, 4)],
        ],
        "left",
    )
    stock = onevision()
    for name in ("pixel_values", "image_sizes", "pixel_values_videos"):
        inputs[name] = stock.inputs[name]
    clip = grid(5, 2, 2)
    items = (stock.items[0], Item(0, VIDEO, clip), Item(1, VIDEO, clip))
    return Case(tiny_models.llava_next_video_model(), inputs, items)


def qwen(stock: Case, patch: int, *, timestamps: bool = False) -> Case:
    """Clips of four and three temporal patches of different size, and an image."""

    def clip(count: int, size: int, seed: int) -> list[int]:
        if not timestamps:
            return [9, *[VIDEO] * (count * size), 10]
        parts = ([*words(2, seed + i), 9, *[VIDEO] * size, 10] for i in range(count))
        return [token for part in parts for token in part]

    inputs: dict[str, Any] = pad(
        [
            [BOS, *words(3, 1), 9, *[IMAGE] * 6, 10, *clip(4, 4, 50), *words(4, 5)],
            [BOS, *words(2, 3), *clip(3, 6, 60), *words(3, 4)],
        ],
        "left",
    )
    ids = inputs["input_ids"]
    channels = 3 * 2 * patch * patch
    inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    inputs["image_grid_thw"] = torch.tensor([[1, 4, 6]])
    inputs["video_grid_thw"] = torch.tensor([[4, 4, 4], [3, 4, 6]])
    inputs["pixel_values"] = noise(4 * 6, channels)
    inputs["pixel_values_videos"] = noise(4 * 16 + 3 * 24, channels, seed=2)
    if "second_per_grid_ts" in stock.inputs:
        inputs["second_per_grid_ts"] = torch.tensor([1.0, 0.5])
    items = (
        Item(0, IMAGE, grid(1, 2, 3)),
        Item(0, VIDEO, grid(4, 2, 2)),
        Item(1, VIDEO, grid(3, 2, 3)),
    )
    return Case(stock.model, inputs, items)


CASES: dict[str, Callable[[], Case]] = {
    "onevision": onevision,
    **({"llava-next-video": llava_next_video} if TINY["llava-next-video"].in_this_release else {}),
    "qwen2-vl": lambda: qwen(tiny_models.qwen2_vl(), 14),
    "qwen2.5-vl": lambda: qwen(tiny_models.qwen2_5_vl(), 14),
    "qwen3-vl": lambda: qwen(tiny_models.qwen3_vl(), 16, timestamps=True),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def tower(model: Any) -> Any:
    return model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower


def clip_pixels(case: Case) -> list[Tensor]:
    """The pixels of each clip, ``(T, ...)``: the picture or the patches of each frame."""
    pixels = case.inputs["pixel_values_videos"]
    if pixels.ndim == 5:
        return list(pixels)
    clips, start = [], 0
    for t, h, w in case.inputs["video_grid_thw"].tolist():
        clips.append(pixels[start : start + t * h * w].reshape(t, h * w, -1))
        start += t * h * w
    return clips


# -- the oracle ----------------------------------------------------------------------------------


def picture(frame: Tensor, height: int, width: int) -> Tensor:
    """The mean colour ``(3, H, W)`` of each two by two patches."""
    colours = torch.zeros(3, height // 2, width // 2)
    for token in range(height * width // 4):
        block = frame[4 * token : 4 * token + 4].reshape(4, 3, -1)
        colours[:, token // (width // 2), token % (width // 2)] = block.mean((0, 2))
    return colours


def descriptors(case: Case) -> list[Tensor]:
    """Means over an 8 x 8 grid of each channel, by loops."""
    described = []
    for clip, pixels in enumerate(clip_pixels(case)):
        rows = []
        for frame in pixels:
            if frame.ndim == 2:
                frame = picture(frame, *case.inputs["video_grid_thw"][clip, 1:].tolist())
            _, height, width = frame.shape
            rows.append(
                [
                    float(
                        channel[
                            y * height // SIDE : -(-(y + 1) * height // SIDE),
                            x * width // SIDE : -(-(x + 1) * width // SIDE),
                        ].mean()
                    )
                    for channel in frame
                    for y in range(SIDE)
                    for x in range(SIDE)
                ]
            )
        described.append(torch.tensor(rows))
    return described


def chosen_frames(case: Case, reducer: tr.Reducer) -> list[list[int]]:
    return [
        reducer(tr.VisualTokens.from_grid(clip, (len(clip), 1, 1))).positions[0].tolist()
        for clip in descriptors(case)
    ]


@torch.no_grad()
def encoded_alone(case: Case, clip: int, index: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Features of some frames of a clip by the unmodified model, and of each DeepStack layer."""
    pixels, owner = clip_pixels(case)[clip][index], case.model.model
    if pixels.ndim == 4:
        out = owner.get_video_features(pixels[None], return_dict=True)
    else:
        grid_thw = case.inputs["video_grid_thw"][clip : clip + 1].clone()
        grid_thw[0, 0] = len(index)
        out = owner.get_video_features(pixels.flatten(0, 1), grid_thw, return_dict=True)
    deepstack = getattr(out, "deepstack_features", None) or []
    return out.pooler_output[0], [layer[0] for layer in deepstack]


def prompts_of(case: Case, kept: list[list[int]]) -> list[ReducedPrompt]:
    """The prompts with the columns of unchosen frames removed by hand."""
    prefill = reference.captured_prefill(case)
    embeds, ids = prefill["inputs_embeds"].clone(), case.inputs["input_ids"]
    layers = reference.deepstack_layers(prefill)
    keep = case.inputs["attention_mask"].bool()
    clips = [item for item in case.items if item.token == VIDEO]
    for clip, (item, index) in enumerate(zip(clips, kept, strict=True)):
        columns = (ids[item.prompt] == VIDEO).nonzero().squeeze(1)
        stays = [
            place
            for place, (_, t, _, _) in enumerate(item.coords)
            if t in index or place in item.protected
        ]
        features, stacked = encoded_alone(case, clip, index)
        keep[item.prompt, columns] = False
        keep[item.prompt, columns[stays]] = True
        embeds[item.prompt, columns[stays]] = features
        for layer, alone in zip(layers, stacked, strict=True):
            layer[item.prompt, columns[stays]] = alone
    positions = prefill.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    positions = positions.expand(*positions.shape[:-2], *ids.shape)
    prompts = []
    for row in range(len(ids)):
        columns = keep[row].nonzero().squeeze(1)
        deepstack: dict[str, Any] = {}
        if layers:
            visual = torch.isin(ids[row, columns], torch.tensor([IMAGE, VIDEO]))
            deepstack["visual_pos_masks"] = visual[None]
            deepstack["deepstack_visual_embeds"] = [la[row, columns][visual] for la in layers]
        row_positions = positions[..., row : row + 1, columns]
        row_embeds = embeds[row, columns][None]
        prompts.append(ReducedPrompt(row_embeds, row_positions, columns, deepstack, row, prefill))
    return prompts


def generate(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        out = case.model.generate(
            **case.batch(), **options, return_dict_in_generate=True, output_logits=True
        )
    return out.sequences[:, case.inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def logits(case: Case) -> Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


# -- equality ------------------------------------------------------------------------------------

CHOICES = {
    "uneven": UnevenRandom(),
    "uniform": tr.create_strategy("uniform", keep=2),
    "random": tr.create_strategy("random", keep_ratio=0.5),
    "divprune": tr.create_strategy("divprune", keep=2),
    "last": Chooses(keep=1, indices=(2,)),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_generation_equals_encoding_the_chosen_frames_alone(case: Case, choice: str) -> None:
    reducer = CHOICES[choice]
    kept = chosen_frames(case, reducer)
    expected_ids, expected = reference.decoded(case, prompts_of(case, kept), STEPS)
    unreduced = generate(case)[1]
    with tr.attach(case.model, frames(reducer)) as run:
        ids, steps = generate(case)
        assert torch.equal(ids, expected_ids)
        assert (steps - expected).abs().max() < 1e-5
        assert not torch.allclose(steps[0], unreduced[0], atol=1e-3)
        clips = [item for item in run.reductions if item.modality == "video"]
    for clip, index in zip(clips, kept, strict=True):
        free = clip.kept[~clip.layout.protected[clip.kept]]
        assert clip.layout.coords[free][:, 1].unique().tolist() == index


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """How many pictures or patches went into the encoder, call by call."""
    counts: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.append(len(args[0] if args else kwargs["hidden_states"]))

    handle = tower(model).register_forward_pre_hook(count, with_kwargs=True)
    yield counts
    handle.remove()


def test_only_the_chosen_frames_are_encoded(case: Case) -> None:
    pixels = clip_pixels(case)
    pictures = pixels[0].ndim == 4
    with counted(case.model) as counts:
        logits(case)
        image, clips = counts
    assert clips == sum(len(clip) if pictures else clip.shape[0] * clip.shape[1] for clip in pixels)
    stage = frames(tr.create_strategy("uniform", keep=2))
    with tr.attach(case.model, stage), counted(case.model) as counts:
        logits(case)
    assert counts == [image, sum(2 if pictures else 2 * clip.shape[1] for clip in pixels)]


@pytest.mark.parametrize("budget", [{"keep": 5}, {"keep_ratio": 1.0}])
def test_keep_all_is_bit_identical(case: Case, budget: dict[str, Any]) -> None:
    before = logits(case)
    ids, steps = generate(case)
    with tr.attach(case.model, frames(tr.create_strategy("uniform", **budget))) as run:
        assert torch.equal(logits(case), before)
        attached_ids, attached = generate(case)
        assert torch.equal(attached_ids, ids)
        assert torch.equal(attached, steps)
        assert run.receipt.ratio == 1.0
        reasons = [item.stages[0].reason for item in run.receipt.items]
    assert reasons[0] == "images have no frames"
    assert all("frames, within the budget" in reason for reason in reasons[1:])


def test_detach_is_exact(case: Case) -> None:
    before = logits(case)
    attributes = set(vars(case.model.model))
    run = tr.attach(case.model, frames(UnevenRandom()))
    reduced = logits(case)
    run.detach()
    assert torch.equal(logits(case), before)
    assert set(vars(case.model.model)) == attributes
    assert not torch.equal(reduced, before)


@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen3-vl"])
def test_beams_keep_what_was_chosen(name: str) -> None:
    # DeepStack features cannot be passed to generate, so there is nothing to compare Qwen3-VL with.
    case = CASES[name]()
    reducer = UnevenRandom()
    prompts = prompts_of(case, chosen_frames(case, reducer))
    with tr.attach(case.model, frames(reducer)):
        attached = generate(case, num_beams=3)[0]
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = case.model.generate(
                inputs_embeds=prompt.embeds,
                attention_mask=torch.ones(prompt.embeds.shape[:2], dtype=torch.long),
                position_ids=prompt.positions,
                max_new_tokens=STEPS,
                do_sample=False,
                num_beams=3,
            )[0]
        assert torch.equal(attached[row], alone)


def test_gradients_reach_the_encoder(case: Case) -> None:
    with tr.attach(case.model, frames(tr.create_strategy("uniform", keep=2))):
        case.model(**case.batch()).logits[:, -1].sum().backward()
    gradients = [p.grad for p in tower(case.model).parameters() if p.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


# -- what follows --------------------------------------------------------------------------------


def test_receipts_count_tokens(case: Case) -> None:
    with tr.attach(case.model, frames(tr.create_strategy("uniform", keep=2))) as run:
        logits(case)
        receipt = run.receipt
    for item, known in zip(receipt.items, case.items, strict=True):
        [stage] = item.stages
        assert stage.site == "frames"
        assert stage.tokens_in == len(known.coords)
        assert stage.protected == len(known.protected)
        if known.token == IMAGE:
            assert stage.tokens_out == len(known.coords)
            assert stage.reason == "images have no frames"
        else:
            count = 1 + max(t for _, t, _, _ in known.coords)
            free = len(known.coords) - len(known.protected)
            assert stage.tokens_out == 2 * free // count + len(known.protected)


def test_a_stage_at_the_projector_reduces_what_is_left(case: Case) -> None:
    choice = tr.create_strategy("uniform", keep=2)
    with tr.attach(case.model, [frames(choice), EveryOther(reduction=2)]) as run:
        generate(case)
        receipt, reductions = run.receipt, run.reductions
    for item, known in zip(receipt.items, case.items, strict=True):
        first, second = item.stages
        assert (first.site, second.site) == ("frames", "projector")
        assert first.tokens_out == second.tokens_in > second.tokens_out
        assert second.protected == len(known.protected)
    clips = [item for item in reductions if item.modality == "video"]
    for clip, index in zip(clips, chosen_frames(case, choice), strict=True):
        free = clip.kept[~clip.layout.protected[clip.kept]]
        assert set(clip.layout.coords[free][:, 1].tolist()) <= set(index)


def test_two_stages_of_frames_compose(case: Case) -> None:
    first, second = tr.create_strategy("uniform", keep=3), tr.create_strategy("divprune", keep=1)
    with tr.attach(case.model, [frames(first), frames(second)]) as run:
        logits(case)
        for item in run.receipt.items[1:]:
            assert item.stages[0].tokens_out == item.stages[1].tokens_in > item.tokens_out


def without_pixels(case: Case) -> dict[str, Any]:
    """The inputs with features that were encoded beforehand, once for several questions."""
    batch, owner = case.batch(), case.model.model
    images = {key: batch.pop(key) for key in ("pixel_values", "image_sizes") if key in batch}
    clips = {"pixel_values_videos": batch.pop("pixel_values_videos")}
    if "video_grid_thw" in batch:
        images["image_grid_thw"] = batch["image_grid_thw"]
        clips["video_grid_thw"] = batch["video_grid_thw"]
    with torch.no_grad():
        batch["mm_encoder_outputs"] = {
            "image": owner.get_image_features(**images, return_dict=True),
            "video": owner.get_video_features(**clips, return_dict=True),
        }
    return batch


def test_features_that_were_encoded_once_keep_their_frames(case: Case) -> None:
    with tr.attach(case.model, frames(UnevenRandom())) as run, torch.no_grad():
        expected = case.model(**case.batch()).logits
        assert torch.equal(case.model(**without_pixels(case)).logits, expected)
        assert run.receipt.tokens_out < run.receipt.tokens_in


def test_features_encoded_under_other_stages_are_refused(case: Case) -> None:
    before = logits(case)
    plain = without_pixels(case)
    stage = frames(tr.create_strategy("uniform", keep=1))
    with tr.attach(case.model, stage) as run, torch.no_grad():
        with pytest.raises(StageNotEngaged, match="'frames' never saw"):
            case.model(**plain)
        reduced = without_pixels(case)
        with run.disabled():
            with pytest.raises(AttachmentError, match="lack what"):
                case.model(**reduced)
            assert torch.equal(logits(case), before)
            assert run.receipt.reason == "the attachment is disabled"


def test_timestamps_survive_where_frames_are_dropped() -> None:
    case = CASES["qwen3-vl"]()
    with tr.attach(case.model, frames(tr.create_strategy("uniform", keep=1))) as run:
        logits(case)
        receipt = run.receipt
    gone = torch.tensor([3 * 4, 2 * 6])
    assert receipt.tokens_in - receipt.tokens_out == int(gone.sum())
    longest = case.inputs["attention_mask"].sum(1)
    assert receipt.sequence_out == int((longest - gone).max())


# -- refusals ------------------------------------------------------------------------------------


def test_models_that_take_clips_for_images_are_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedSite, match="as so many images"):
        tr.attach(tiny_models.internvl().model, frames(UnevenRandom()))


def test_stages_that_cannot_choose_frames_are_refused() -> None:
    case = onevision()
    attributes = set(vars(case.model.model))
    with pytest.raises(UnsupportedSite, match="does not run at the site 'frames'"):
        frames(tr.create_strategy("tome", keep=2))
    with pytest.raises(UnsupportedSite, match="merges"):
        tr.attach(case.model, frames(EveryOther(keep=2)))
    stage = tr.Stage(reducer=tr.create_strategy("uniform"), site="frames", total=4)
    with pytest.raises(BudgetError, match="same prompt"):
        tr.attach(case.model, stage)
    assert set(vars(case.model.model)) == attributes
    with (
        tr.attach(case.model, frames(tr.create_strategy("uniform", keep=2))) as run,
        run.budget(total=4),
        pytest.raises(BudgetError, match="same prompt"),
    ):
        logits(case)


def test_what_was_computed_for_all_frames_is_refused() -> None:
    case = CASES["qwen2.5-vl"]()
    with (
        tr.attach(case.model, frames(tr.create_strategy("uniform", keep=1))),
        pytest.raises(UnsupportedSite, match="video_cu_seqlens"),
    ):
        case.model.model.get_video_features(
            case.inputs["pixel_values_videos"],
            case.inputs["video_grid_thw"],
            video_cu_seqlens=torch.tensor([0, 16]),
        )


@dataclass(frozen=True, kw_only=True)
class Attentive(UnevenRandom):
    @property
    def needs(self) -> tuple[str, ...]:
        return ("vision_features",)


def test_strategies_that_read_the_encoder_are_refused() -> None:
    model = onevision().model
    with pytest.raises(MissingSignal):
        tr.attach(model, frames(Attentive()))
    with pytest.raises(UnsupportedSite, match="some frames only"):
        tr.attach(model, [frames(UnevenRandom()), Attentive()])
