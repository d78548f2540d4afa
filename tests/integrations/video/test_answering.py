"""A question about a video file is answered as one about its frames, in memory for few of them."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from support.clip_models import AS_IMAGES, NAMES, SIBLINGS, ClipModel, clip_model
from support.qwen_files import shapes, write_clip
from support.reference import greedy
from support.tiny_models import IMAGE, VIDEO, Case, Item, grid
from tokenreduce.errors import MediaError, PipelineError, UnsupportedModel
from tokenreduce.stage import Stage
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.cli.app import app
from tokenreduce_integrations.testbed.models import load as load_testbed
from tokenreduce_integrations.video import answering
from tokenreduce_integrations.video.decoding import VideoFile
from tokenreduce_integrations.video.forms import FORMS, REASONS, form_of

pytest.importorskip("av", reason="the extra 'video' is missing")
# GLM's own processor.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FPS = 2.0
QUESTION = "what moves here"


def pipeline(files: Path, strategy: str = "lftr", **budget: float) -> tr.Pipeline:
    return tr.load_pipeline(
        {"model": {"path": str(files)}, "reduce": [{"strategy": strategy, **budget}]}
    )


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_clip(tmp_path / "clip.mp4", shapes(45, 120, 160))


def frames_of(clip: Path) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(frame) for frame in VideoFile(clip).frames(FPS))


def whole_inputs(loaded: ClipModel, clip: Path) -> dict[str, Any]:
    """What the model's own processor makes of all frames at once."""
    model, processor = loaded
    frames = frames_of(clip)
    inputs = chat.encode(processor, chat.Media("video", frames), QUESTION, model.device, fps=FPS)
    if model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor([2 / FPS])
    return inputs


def seen_by_decoder(model: Any, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """What a call gives, and the arguments of the decoder in the prefill."""
    seen: dict[str, Any] = {}

    def remember(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.update(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    result = call()
    handle.remove()
    return result, seen


def streamed(
    loaded: ClipModel, clip: Path, reducer: tr.Reducer | None, tokens: int = 8
) -> tuple[str, tuple[int, int], answering.Encoded]:
    encoded = answering.encode_clip(*loaded, VideoFile(clip), reducer, fps=FPS)
    text, lengths = answering.answer(*loaded, encoded, QUESTION, max_new_tokens=tokens)
    return text, lengths, encoded


BUDGETS = [("lftr", {"keep": 13}), ("lftr", {"keep_ratio": 1.0}), ("tome", {"reduction": 6})]
#: InternVL, attached, takes each frame for an item of its own.
CASES = [
    (name, *budget)
    for name in NAMES
    for budget in BUDGETS
    if name != "internvl" or budget == BUDGETS[1]
]


@pytest.mark.parametrize(("name", "strategy", "budget"), CASES)
def test_the_answer_is_that_of_the_whole_clip(clip, name, strategy, budget) -> None:
    loaded, reducer = clip_model(name), tr.create_strategy(strategy, **budget)
    (text, lengths, encoded), own = seen_by_decoder(
        loaded.model, lambda: streamed(loaded, clip, reducer)
    )
    inputs = whole_inputs(loaded, clip)
    with tr.attach(loaded.model, reducer) as run:
        expected, exact = seen_by_decoder(
            loaded.model, lambda: chat.answer(*loaded, inputs, max_new_tokens=8)
        )
    assert text == expected
    assert lengths == (run.receipt.sequence_in, run.receipt.sequence_out)
    torch.testing.assert_close(own["inputs_embeds"], exact["inputs_embeds"], rtol=1e-4, atol=1e-4)
    if exact["position_ids"] is not None:
        axes = len(own["position_ids"])
        assert own["position_ids"].equal(exact["position_ids"][-axes:])
    for layer, whole in zip(
        own.get("deepstack_visual_embeds") or (),
        exact.get("deepstack_visual_embeds") or (),
        strict=True,
    ):
        torch.testing.assert_close(layer, whole, rtol=1e-4, atol=1e-4)
    if name != "internvl":
        [told] = [item.stages for item in run.receipt.items]
        stage = Stage(reducer=reducer, site="projector")
        [item] = answering.receipt(loaded.model, encoded, stage, lengths).items
        assert item.stages == told


@pytest.mark.parametrize("name", [*NAMES, *SIBLINGS])
def test_the_answer_is_that_of_a_recomputation(clip, name) -> None:
    """Reduced by hand, of what the unmodified model gives, without a cache."""
    loaded, reducer = clip_model(name), tr.create_strategy("lftr", keep=13)
    text, _, encoded = streamed(loaded, clip, reducer)
    t, h, w = encoded.grid
    coords, end = grid(t, h, w), len(encoded.chunk.end)
    coords += [(0, t - 1, h - 1, w)] * end
    token = IMAGE if name in AS_IMAGES else VIDEO
    inputs = whole_inputs(loaded, clip)
    item = Item(0, token, coords, tuple(range(t * h * w, len(coords))))
    ids, _ = greedy(Case(loaded.model, inputs, (item,)), reducer, 8)
    assert text == loaded.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_of_one_picture(tmp_path, name) -> None:
    loaded = clip_model(name)
    clip = write_clip(tmp_path / "short.mp4", shapes(1, 120, 160))
    text, lengths, encoded = streamed(loaded, clip, tr.create_strategy("lftr", keep=400))
    assert encoded.grid[0] == encoded.frames == 1
    # Some take pairs of pictures only.
    times = [0, 0] if name.startswith(("qwen3", "glm")) else [0]
    inputs = loaded.processor(
        text=[chat.write(loaded.processor, "video", QUESTION)],
        videos=[np.stack([np.asarray(*frames_of(clip))] * len(times))],
        video_metadata=[{"total_num_frames": len(times), "fps": FPS, "frames_indices": times}],
        do_sample_frames=False,
        return_tensors="pt",
    )
    assert text == chat.answer(*loaded, dict(inputs), max_new_tokens=8)
    assert lengths[0] == lengths[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "llava-onevision"])
def test_batches_of_frames_change_nothing(clip, monkeypatch, name) -> None:
    loaded, reducer = clip_model(name), tr.create_strategy("lftr", keep=30)
    few = answering.encode_clip(*loaded, VideoFile(clip), reducer, fps=FPS)
    monkeypatch.setattr(answering, "MOMENTS", 100)
    many = answering.encode_clip(*loaded, VideoFile(clip), reducer, fps=FPS)
    assert few.grid == many.grid
    torch.testing.assert_close(few.tokens.features, many.tokens.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_held_does_not_grow_with_the_clip(tmp_path, name) -> None:
    loaded, reducer = clip_model(name), tr.create_strategy("lftr", keep=16)
    held = []
    for count in (15, 150):
        clip = write_clip(tmp_path / f"{count}.mp4", shapes(count, 64, 64))
        end, sums = count / 5 - 0.01, []
        # Windows of the length that is left to chance elsewhere.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tokenreduce.stream.WINDOW", 32)
            answering.encode_clip(
                *loaded,
                VideoFile(clip),
                reducer,
                fps=5,
                progress=lambda seconds, end=end, sums=sums: (
                    sums.append(bytes_in_tensors()) if seconds >= end else None
                ),
            )
        held.append(sums[-1])
    assert held[1] <= 1.01 * held[0]


def bytes_in_tensors() -> int:
    """Bytes of all tensors that anything holds, but for stand-ins such as fake ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def ask(files: Path, clip: Path, tmp_path: Path, *options: str, **budget: float):
    path = tmp_path / "pipeline.yaml"
    stage = json.dumps({"strategy": "lftr", **budget})
    path.write_text(f"model: {{path: {files}}}\nreduce: [{stage}]\n")
    arguments = ["run", str(path), str(clip), "what moves here", "--max-new-tokens", "5", *options]
    return CliRunner().invoke(app, arguments)


def test_the_command_line(model_files, clip, tmp_path) -> None:
    result = ask(model_files, clip, tmp_path, "--json", "--fps", "2", keep=40)
    document = json.loads(result.stdout)
    assert document["answer"]
    assert document["receipt"]["tokens_out"] == 40
    assert document["receipt"]["tokens_in"] == 9 * 12
    plain = ask(model_files, clip, tmp_path, keep=40)
    assert "-> 40 visual tokens" in plain.stdout
    full = json.loads(ask(model_files, clip, tmp_path, "--json", "--no-reduction", keep=40).stdout)
    assert full["reduced"] is False
    assert full["receipt"]["tokens_out"] == 9 * 12


@pytest.mark.parametrize("name", ["qwen3-vl", "llava-onevision", "llava-next-video", "internvl"])
def test_the_command_line_of_other_families(tmp_path, clip, name) -> None:
    files = tmp_path / "model"
    for part in clip_model(name):
        part.save_pretrained(files)
    document = json.loads(ask(files, clip, tmp_path, "--json", "--fps", "2", keep=24).stdout)
    assert document["answer"]
    assert document["receipt"]["tokens_out"] == 24 + (name == "llava-onevision")


@pytest.mark.parametrize("name", NAMES)
def test_all_frames_of_a_folder_are_taken(clip, name) -> None:
    """Processors would choose some by themselves, and guess at when they are."""
    loaded = clip_model(name)
    media = chat.Media("video", frames_of(clip))
    inputs = chat.encode(loaded.processor, media, QUESTION, loaded.model.device, fps=FPS)
    pixels = inputs.get("video_grid_thw", inputs.get("pixel_values_videos"))
    taken = {"internvl": lambda: len(inputs["pixel_values"]), "llava": lambda: pixels.shape[1]}
    kind = name.partition("-")[0]
    assert taken.get(kind, lambda: 2 * int(pixels[0, 0]))() == len(media.frames) == 18
    if name.startswith("qwen3"):
        assert "< 8 . 2 seconds >" in loaded.processor.decode(inputs["input_ids"][0])


def test_a_clip_shorter_than_a_moment(model_files, tmp_path) -> None:
    clip = write_clip(tmp_path / "short.mp4", shapes(1, 120, 160))
    document = json.loads(ask(model_files, clip, tmp_path, "--json", keep=40).stdout)
    assert document["receipt"]["tokens_out"] == document["receipt"]["tokens_in"] == 12


def test_what_cannot_work_is_one_message(model_files, clip, tmp_path) -> None:
    (tmp_path / "text.mp4").write_text("no clip")
    result = ask(model_files, tmp_path / "text.mp4", tmp_path, keep=4)
    assert result.exit_code == 1
    assert "cannot be decoded" in result.stderr
    stages = pipeline(model_files, keep=4).stages
    with pytest.raises(PipelineError, match="one stage at the site 'projector'"):
        answering.the_stage((*stages, *stages))
    with pytest.raises(UnsupportedModel, match="how it takes clips is not known"):
        form_of(*load_testbed("b"))
    model, processor = clip_model("qwen3-vl")
    for kind, reason in REASONS.items():
        other = SimpleNamespace(config=SimpleNamespace(model_type=kind))
        with pytest.raises(UnsupportedModel, match=reason):
            form_of(other, processor)
    encoded = answering.encode_clip(model, processor, VideoFile(clip), None, fps=FPS)
    with pytest.raises(MediaError, match="stands for a clip"):
        answering.answer(model, processor, encoded, "a <|video_pad|> here", max_new_tokens=1)


def test_the_families_are_those_of_the_library() -> None:
    assert {*FORMS, *REASONS} <= {*transformers.CONFIG_MAPPING.keys()}


def test_pictures_that_cannot_be_decoded_cost_no_more_tokens(
    model_files, clip, monkeypatch
) -> None:
    model, processor, attachment = pipeline(model_files, reduction=6).build()
    attachment.detach()
    file = VideoFile(clip)
    monkeypatch.setattr(file, "count", lambda fps: 20)
    encoded = answering.encode_clip(model, processor, file, attachment.stages[0].reducer, fps=FPS)
    assert encoded.tokens.count == round(int(np.prod(encoded.grid)) / 6)
