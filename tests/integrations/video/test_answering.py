"""A question about a video file is answered as one about its frames, in memory for few of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from support.qwen_files import shapes, write_clip
from tokenreduce.errors import PipelineError, UnsupportedModel
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.cli.app import app
from tokenreduce_integrations.testbed.models import load as load_testbed
from tokenreduce_integrations.video import answering
from tokenreduce_integrations.video.decoding import VideoFile

pytest.importorskip("av", reason="the extra 'video' is missing")

FPS = 2.0


def pipeline(files: Path, strategy: str = "lftr", **budget: float) -> tr.Pipeline:
    return tr.load_pipeline(
        {"model": {"path": str(files)}, "reduce": [{"strategy": strategy, **budget}]}
    )


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_clip(tmp_path / "clip.mp4", shapes(60, 120, 160))


def whole_clip(model, processor, clip: Path, reducer, question: str):
    """Ids and positions through the attachment, with all frames given at once."""
    frames = list(VideoFile(clip).frames(FPS))
    media = chat.Media("video", tuple(Image.fromarray(f) for f in frames))
    inputs = chat.encode(processor, media, question, model.device)
    inputs["second_per_grid_ts"] = torch.tensor([2 / FPS])
    seen = {}

    def remember(_, __, kwargs):
        seen.setdefault("positions", kwargs["position_ids"].clone())

    with tr.attach(model, reducer) as run:
        handle = model.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
        text = chat.answer(model, processor, inputs, max_new_tokens=12)
        handle.remove()
    return text, seen["positions"], run.receipt


@pytest.mark.parametrize("strategy", ["lftr", "norm-topk", "divprune"])
@pytest.mark.parametrize("budget", [{"keep": 23}, {"reduction": 8}, {"keep_ratio": 1.0}])
def test_the_answer_is_that_of_the_whole_clip(model_files, clip, strategy, budget) -> None:
    model, processor, attachment = pipeline(model_files, strategy, **budget).build()
    [stage] = attachment.stages
    attachment.detach()
    encoded = answering.encode_clip(model, processor, VideoFile(clip), stage.reducer, fps=FPS)
    text, lengths = answering.answer(
        model, processor, encoded, "what moves here", max_new_tokens=12
    )
    expected, exact, receipt = whole_clip(model, processor, clip, stage.reducer, "what moves here")
    assert text == expected
    assert lengths == (receipt.sequence_in, receipt.sequence_out)
    start = int(exact[-1, 0].min())
    full = answering._positions(
        model, processor, encoded, *answering_prompt(model, processor, encoded)
    )
    assert full.equal(exact[-3:] - start)


def answering_prompt(model, processor, encoded):
    inputs = chat.encode(
        processor, chat.Media("video", encoded.first), "what moves here", model.device
    )
    ids = inputs["input_ids"][0]
    places = (ids == processor.video_token_id).nonzero()[:, 0]
    return ids[: places[0]], ids[places[-1] + 1 :]


def test_batches_of_frames_change_nothing(model_files, clip, monkeypatch) -> None:
    model, processor, attachment = pipeline(model_files, keep=30).build()
    attachment.detach()
    reducer = attachment.stages[0].reducer
    few = answering.encode_clip(model, processor, VideoFile(clip), reducer, fps=FPS)
    monkeypatch.setattr(answering, "MOMENTS", 100)
    many = answering.encode_clip(model, processor, VideoFile(clip), reducer, fps=FPS)
    assert few.grid == many.grid
    torch.testing.assert_close(few.tokens.features, many.tokens.features, rtol=1e-4, atol=1e-4)


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
    assert document["receipt"]["tokens_in"] == 12 * 12
    plain = ask(model_files, clip, tmp_path, keep=40)
    assert "-> 40 visual tokens" in plain.stdout
    full = json.loads(ask(model_files, clip, tmp_path, "--json", "--no-reduction", keep=40).stdout)
    assert full["reduced"] is False
    assert full["receipt"]["tokens_out"] == 144


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
    with pytest.raises(UnsupportedModel, match="folder of frames"):
        answering.require_served(*load_testbed("b"))


def test_a_stated_duration_that_is_too_long_costs_no_more_tokens(
    model_files, clip, monkeypatch
) -> None:
    model, processor, attachment = pipeline(model_files, reduction=6).build()
    attachment.detach()
    file = VideoFile(clip)
    file.duration = file.duration * 1.09
    encoded = answering.encode_clip(model, processor, file, attachment.stages[0].reducer, fps=FPS)
    assert encoded.tokens.count == round(int(np.prod(encoded.grid)) / 6)
