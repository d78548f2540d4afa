"""A patch is planted in a picture, a strategy keeps the token that it changed most, and the overlay
must mark the pixels of the patch: through the model's own processor, encoder and packing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import tokenreduce as tr
from support import tiny_models
from support.tiny_models import BOS, IMAGE, VIDEO
from tokenreduce.attachment import ItemReduction
from tokenreduce.reducer import Selector
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_integrations.overlay import draw_panel
from tokenreduce_integrations.seen import Panel, panels

GROUND, PLANT = (90, 90, 90), (255, 0, 0)
MEAN = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}


class Memory:
    """The tokens of the picture without the patch, by their number."""

    def __init__(self) -> None:
        self.features: dict[int, Tensor] = {}


@dataclass(frozen=True, kw_only=True)
class MostChanged(Selector):
    """Keeps, in each tile and frame, the token that differs most from what was remembered; of
    those, the ones that differ most."""

    memory: Memory = field(default_factory=Memory)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        before = self.memory.features.setdefault(tokens.count, tokens.features.clone())
        changed = (tokens.features - before).norm(dim=-1)[0]
        best: dict[tuple[int, ...], int] = {}
        for i, place in enumerate(map(tuple, tokens.layout.coords[:, :2].tolist())):
            if place not in best or changed[i] > changed[best[place]]:
                best[place] = i
        return torch.tensor([sorted(best.values(), key=lambda i: -float(changed[i]))[:k]])


@dataclass(frozen=True)
class Setting:
    """A model with its own processor.

    Attributes:
        case: makes the model.
        processor: its image or video processor.
        size: width and height of the picture.
        plant: (left, top, right, bottom) of the patch in the picture.
        sees: for each panel that shows the patch, by its number, the cell that must be marked.
        grids: how many panels there are.
        frames: 0 for a picture; else how many a clip has.
        at: the frames that hold the patch.
    """

    case: Callable[[], Any]
    processor: Any
    size: tuple[int, int]
    plant: tuple[int, int, int, int]
    sees: Mapping[int, tuple[int, int, int, int]]
    grids: int
    frames: int = 0
    at: tuple[int, ...] = ()
    change: Mapping[str, Any] = field(default_factory=dict)


PINPOINTS = [[56, 112], [112, 56], [112, 112]]
TILED = {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": PINPOINTS, **MEAN}
CROPS = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
SMALL = {"size": {"shortest_edge": 28 * 28, "longest_edge": 1 << 20}, **MEAN}
INTERN = {"size": {"height": 56, "width": 56}, "max_patches": 6, "crop_to_patches": True, **MEAN}

#: 160 x 100 becomes 112 x 70 in a canvas of 112 x 112, whose first and last row of patches go.
PADDED = {
    "size": (160, 100),
    "plant": (100, 30, 120, 50),
    "grids": 2,
    "sees": {0: (28, 14, 42, 28), 1: (70, 28, 84, 42)},
}

SETTINGS = {
    # The middle of a wide picture, as a centre crop leaves it.
    "llava": Setting(
        tiny_models.llava,
        transformers.CLIPImageProcessor(**CROPS, **MEAN),
        size=(112, 56),
        plant=(56, 14, 70, 28),
        sees={0: (28, 14, 42, 28)},
        grids=1,
    ),
    "llava-next": Setting(
        tiny_models.llava_next,
        transformers.LlavaNextImageProcessor(**{**TILED, **CROPS}),
        **PADDED,
    ),
    "onevision": Setting(
        tiny_models.onevision, transformers.LlavaOnevisionImageProcessor(**TILED), **PADDED
    ),
    # 6 x 8 patches are interpolated to 3 x 4 tokens.
    "onevision, interpolated": Setting(
        tiny_models.onevision,
        transformers.LlavaOnevisionImageProcessor(**TILED),
        change={"vision_aspect_ratio": "anyres_max_1"},
        **{**PADDED, "sees": {0: (28, 14, 42, 28), 1: (56, 28, 84, 56)}},
    ),
    # Tokens of 2 x 2 patches by pixel shuffle; 3 x 2 tiles and a thumbnail.
    "internvl": Setting(
        tiny_models.internvl,
        transformers.GotOcr2ImageProcessor(**INTERN),
        size=(168, 112),
        plant=(140, 56, 168, 84),
        sees={0: (140, 56, 168, 84), 1: (28, 28, 56, 56)},
        grids=2,
    ),
    "internvl, tall": Setting(
        tiny_models.internvl,
        transformers.GotOcr2ImageProcessor(**INTERN),
        size=(112, 168),
        plant=(56, 140, 84, 168),
        sees={0: (56, 140, 84, 168), 1: (28, 28, 56, 56)},
        grids=2,
    ),
    "internvl, one tile": Setting(
        tiny_models.internvl_single,
        transformers.GotOcr2ImageProcessor(**{**INTERN, "max_patches": 1}),
        size=(56, 56),
        plant=(28, 0, 56, 28),
        sees={0: (28, 0, 56, 28)},
        grids=1,
    ),
    **{
        name: Setting(
            case,
            transformers.Qwen2VLImageProcessor(patch_size=patch, **SMALL),
            size=(8 * patch, 6 * patch),
            plant=(4 * patch, 2 * patch, 6 * patch, 4 * patch),
            sees={0: (4 * patch, 2 * patch, 6 * patch, 4 * patch)},
            grids=1,
        )
        for name, case, patch in (
            ("qwen2-vl", tiny_models.qwen2_vl, 14),
            ("qwen2.5-vl", tiny_models.qwen2_5_vl, 14),
            ("qwen3-vl", tiny_models.qwen3_vl, 16),
        )
    },
    # A token stands for two frames.
    **{
        f"{name}, clip": Setting(
            case,
            processor(patch_size=patch, do_sample_frames=False, **SMALL),
            size=(8 * patch, 6 * patch),
            plant=(4 * patch, 2 * patch, 6 * patch, 4 * patch),
            sees={1: (4 * patch, 2 * patch, 6 * patch, 4 * patch)},
            grids=3,
            frames=6,
            at=(2, 3),
        )
        for name, case, patch, processor in (
            ("qwen2.5-vl", tiny_models.qwen2_5_vl, 14, transformers.Qwen2VLVideoProcessor),
            ("qwen3-vl", tiny_models.qwen3_vl, 16, transformers.Qwen3VLVideoProcessor),
        )
    },
    # Frames are squashed, and 4 x 4 patches pooled to 2 x 2 tokens.
    "onevision, clip": Setting(
        tiny_models.onevision,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}, **MEAN),
        size=(112, 56),
        plant=(56, 28, 112, 56),
        sees={2: (28, 28, 56, 56)},
        grids=3,
        frames=3,
        at=(2,),
    ),
}


def drawn(setting: Setting, planted: bool) -> list[Image.Image]:
    ground = Image.new("RGB", setting.size, GROUND)
    holding = ground.copy()
    holding.paste(PLANT, setting.plant)
    if not setting.frames:
        return [holding if planted else ground]
    return [holding if planted and i in setting.at else ground for i in range(setting.frames)]


def prepared(setting: Setting, model: Any, pictures: list[Image.Image]) -> dict[str, Any]:
    """The model's inputs, with as many placeholders as its own encoding has features."""
    if setting.frames:
        frames = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
        inputs = dict(setting.processor(videos=[frames], return_tensors="pt"))
        encode, token = model.get_video_features, VIDEO
    else:
        inputs = dict(setting.processor(images=pictures, return_tensors="pt"))
        encode, token = model.get_image_features, IMAGE
    inputs.pop("num_patches", None)
    with torch.no_grad():
        counts = [len(item) for item in encode(**inputs).pooler_output]
    moments = 1
    if "video_grid_thw" in inputs and "Qwen3" in type(model).__name__:
        # A timestamp stands before each moment.
        moments = int(inputs["video_grid_thw"][0, 0])
    ids = [BOS]
    for _ in range(moments):
        ids += [30, 9, *[token] * (sum(counts) // moments), 10]
    inputs["input_ids"] = torch.tensor([[*ids, 40, 41]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "video_grid_thw" in inputs or "image_grid_thw" in inputs:
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def marked(overlay: Image.Image, panel: Panel, picture: int = 0) -> np.ndarray:
    """Which pixels are as bright as the picture."""
    seen = np.asarray(panel.pictures[picture], int)
    return (np.asarray(overlay, int) == seen).all(-1) & (seen.max(-1) > 0)


@pytest.mark.parametrize("site", ["projector", "decoder"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_overlay_marks_the_pixels_of_a_planted_patch(name: str, site: Any) -> None:
    setting = SETTINGS[name]
    model = setting.case().model
    for key, value in setting.change.items():
        setattr(model.config, key, value)
    reducer = MostChanged(keep=len(setting.sees), memory=Memory())
    stage = Stage(reducer=reducer, site=site, layer=1 if site == "decoder" else None)
    processor = SimpleNamespace(
        image_processor=setting.processor, video_processor=setting.processor
    )
    with tr.attach(model, stage) as run, torch.no_grad():
        for planted in (False, True):
            pictures = drawn(setting, planted)
            inputs = prepared(setting, model, pictures)
            model(**inputs)
        items = run.reductions
    [found] = panels(items, inputs, pictures, processor=processor, config=model.config)
    assert len(found) == setting.grids
    for number, panel in enumerate(found):
        overlay = draw_panel(panel, items[0], side=1)
        assert overlay.size == panel.pictures[0].size
        bright = marked(overlay, panel)
        expected = np.zeros_like(bright)
        if number in setting.sees:
            left, top, right, bottom = setting.sees[number]
            expected[top:bottom, left:right] = True
        # Padding is black whether a token is kept or not.
        seen = np.asarray(panel.pictures[0], int)
        np.testing.assert_array_equal(bright, expected & (seen.max(-1) > 0))
        red = (seen[..., 0] > 200) & (seen[..., 1] < 60)
        assert red.any() == (number in setting.sees)
        assert not (red & ~expected).any()


def whole(layout: Layout, modality: str = "image") -> ItemReduction:
    """Nothing was reduced."""
    columns = torch.arange(len(layout))
    return ItemReduction(
        prompt=0, modality=modality, columns=columns, layout=layout, reduction=None
    )


NOTHING = {"processor": SimpleNamespace(), "config": SimpleNamespace()}


def test_pixels_that_cannot_be_read_back_are_those_that_were_given() -> None:
    picture = Image.new("RGB", (60, 40), GROUND)
    [[panel]] = panels([whole(Layout.from_grid((2, 3)))], {}, [picture], **NOTHING)
    assert panel.pictures == (picture,)
    assert panel.boxes[5] == (40, 20, 60, 40)


def test_each_picture_of_a_prompt_has_its_own_panels() -> None:
    first, second = Image.new("RGB", (60, 40)), Image.new("RGB", (20, 20))
    items = [whole(Layout.from_grid((2, 3))), whole(Layout.from_grid((2, 2)))]
    [[one], [other]] = panels(items, {}, [first, second], **NOTHING)
    assert (one.pictures, other.pictures) == ((first,), (second,))


def test_moments_of_a_clip_lie_over_the_frames_that_were_given() -> None:
    frames = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(4)]
    [found] = panels([whole(Layout.from_grid((2, 2, 2)), "video")], {}, frames, **NOTHING)
    assert [panel.pictures[0].getpixel((0, 0))[0] for panel in found] == [0, 2]
    assert [sorted(panel.boxes) for panel in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tokens_without_a_place_are_drawn_in_their_order() -> None:
    [[panel]] = panels([whole(Layout.line(10))], {}, [Image.new("RGB", (9, 9))], **NOTHING)
    assert "order" in panel.label
    assert sorted(panel.boxes) == list(range(10))
    assert panel.boxes[4][1] > panel.boxes[3][1]
    # A very wide picture has one row of tokens too, but these have a place.
    [[panel]] = panels(
        [whole(Layout.from_grid((1, 10)))], {}, [Image.new("RGB", (90, 9))], **NOTHING
    )
    assert panel.boxes[4] == (36, 0, 45, 9)


def test_a_class_token_is_no_part_of_the_picture() -> None:
    patches = Layout.from_grid((2, 2))
    coords = torch.cat([torch.zeros(1, 4, dtype=torch.long), patches.coords])
    layout = Layout(coords, torch.arange(5) == 0, extents=patches.extents)
    [[panel]] = panels([whole(layout)], {}, [Image.new("RGB", (8, 8))], **NOTHING)
    assert sorted(panel.boxes) == [1, 2, 3, 4]
    # A region that the user protected is a part of it.
    layout = patches.protect(torch.tensor([True, False, False, False]))
    [[panel]] = panels([whole(layout)], {}, [Image.new("RGB", (8, 8))], **NOTHING)
    assert sorted(panel.boxes) == [0, 1, 2, 3]


def test_frames_that_are_images_of_their_own_are_read_back_one_by_one() -> None:
    """As InternVL takes clips: each frame is an item, with text before it."""
    prepare = transformers.GotOcr2ImageProcessor(**{**INTERN, "crop_to_patches": False})
    frames = [Image.new("RGB", (56, 56), (shade, shade, shade)) for shade in (40, 160)]
    inputs = dict(prepare(images=frames, return_tensors="pt"))
    processor = SimpleNamespace(image_processor=prepare)
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=[14, 14]))
    items = [whole(Layout.from_grid((2, 2))) for _ in frames]
    found = panels(items, inputs, frames, processor=processor, config=config)
    assert [panel.pictures[0].getpixel((3, 3)) for [panel] in found] == [(40,) * 3, (160,) * 3]


def test_what_pads_a_batch_and_what_no_patch_sees_is_cut_off() -> None:
    prepare = transformers.PixtralImageProcessor(
        size={"longest_edge": 64}, patch_size={"height": 14, "width": 14}
    )
    frames = [Image.new("RGB", (56, 28), GROUND), Image.new("RGB", (28, 56), GROUND)]
    inputs = dict(prepare(images=frames, return_tensors="pt"))
    config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=14))
    processor = SimpleNamespace(image_processor=prepare)
    items = [whole(Layout.from_grid((2, 4))), whole(Layout.from_grid((4, 2)))]
    found = panels(items, inputs, frames, processor=processor, config=config)
    assert [panel.pictures[0].size for [panel] in found] == [(56, 28), (28, 56)]
    prepare = transformers.SiglipImageProcessor(size={"height": 60, "width": 60})
    inputs = dict(prepare(images=frames[:1], return_tensors="pt"))
    processor = SimpleNamespace(image_processor=prepare)
    [[panel]] = panels(
        [whole(Layout.from_grid((4, 4)))], inputs, frames, processor=processor, config=config
    )
    assert panel.pictures[0].size == (56, 56)
