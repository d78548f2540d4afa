import json

import numpy as np
import pytest
from PIL import Image

from support import qwen_files


def test_show_a_pipeline(tokenreduce, pipeline, picture, tmp_path) -> None:
    result = tokenreduce("show", pipeline, picture, "reduce.0.reduction=4")
    assert result.exit_code == 0
    assert "144 -> 36 visual tokens" in result.stdout
    with Image.open(tmp_path / "tokenreduce-overlay.png") as drawn:
        assert drawn.size == (384, 384)


def test_show_a_model(tokenreduce, picture, tmp_path) -> None:
    result = tokenreduce(
        "show",
        "testbed:b",
        picture,
        "--strategy",
        "norm-topk",
        "--reduction",
        8,
        "--output",
        tmp_path / "x.png",
        "--json",
    )
    document = json.loads(result.stdout)
    assert document["output"] == str(tmp_path / "x.png")
    assert document["receipt"]["tokens_out"] == 18
    assert (tmp_path / "x.png").exists()


def test_show_says_what_is_wrong(tokenreduce, pipeline, picture, tmp_path) -> None:
    for arguments, message in (
        (("testbed:z", picture), "no testbed model 'z'"),
        ((pipeline, "no.png"), "no.png: no such file"),
        ((pipeline, picture, "--output", tmp_path / "no" / "x.png"), "cannot be written"),
        ((pipeline, picture, "--output", tmp_path / "x.nonsense"), "cannot be written"),
        ((pipeline, picture, "--question", " "), "the question is empty"),
    ):
        result = tokenreduce("show", *arguments)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr


@pytest.mark.parametrize(
    ("strategy", "options", "left"),
    [
        ("fastv", (), 9),
        ("fastv", ("--layer", 1, "--reduction", 4), 36),
        ("tome", ("--site", "vision", "--reduction", 2), 72),
        ("vtw", (), 0),
        ("divprune", (), 9),
    ],
)
def test_show_a_strategy_wherever_it_runs(
    tokenreduce, picture, tmp_path, strategy, options, left
) -> None:
    result = tokenreduce("show", "testbed:b", picture, "--strategy", strategy, *options)
    assert result.exit_code == 0, result.stderr
    assert f"144 -> {left} visual tokens" in result.stdout
    with Image.open(tmp_path / "tokenreduce-overlay.png") as drawn:
        pixels = np.asarray(drawn, int)
    with Image.open(picture) as original:
        seen = np.asarray(original.convert("RGB").resize((384, 384), 0), int)
    bright = (pixels == seen).all(-1).mean()
    if strategy in ("fastv", "divprune"):
        assert bright == pytest.approx(left / 144, abs=0.01)


def test_heat_says_what_it_is_made_of(tokenreduce, picture, tmp_path) -> None:
    """Scores where the strategy has them; else under how many budgets a token is kept."""
    for strategy, meaning in (("fastv", "the strategy's scores"), ("lftr", "how far")):
        result = tokenreduce("show", "testbed:b", picture, "--strategy", strategy, "--heat")
        assert result.exit_code == 0, result.stderr
        assert f"heat: {meaning}" in result.stdout
        with Image.open(tmp_path / "tokenreduce-overlay.png") as drawn:
            assert drawn.size == (384, 384)


def test_a_strategy_without_a_model_says_what_to_do(tokenreduce, picture) -> None:
    result = tokenreduce("show", "fastv", picture)
    assert result.exit_code == 1
    assert "tokenreduce show MODEL PICTURE --strategy fastv" in result.stderr


def test_clips_become_a_sheet_or_move(tokenreduce, tmp_path) -> None:
    """A token of the tiny Qwen2.5-VL stands for two frames of 28 x 28 pixels."""
    av = pytest.importorskip("av", reason="the extra 'video' is missing")
    model = qwen_files.save_model(tmp_path / "model")
    clip = qwen_files.write_clip(tmp_path / "clip.mp4", qwen_files.shapes(20, 112, 168), rate=10)
    outputs = {name: tmp_path / f"out.{name}" for name in ("png", "gif", "mp4")}
    for output in outputs.values():
        result = tokenreduce(
            "show", model, clip, "--strategy", "uniform", "--reduction", 4, "--fps", 4,
            "--output", output,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert "96 -> 24 visual tokens" in result.stdout
    with Image.open(outputs["png"]) as sheet:
        # Four moments, each of two frames.
        assert sheet.size[0] > 4 * 168
    with Image.open(outputs["gif"]) as moving:
        assert moving.n_frames == 8
        assert moving.info["duration"] == 250
    with av.open(str(outputs["mp4"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 8
        assert container.streams.video[0].average_rate == 4
    frames = np.array(frames, int)
    with Image.open(outputs["gif"]) as moving:
        moving.seek(5)
        assert np.abs(frames[5] - np.asarray(moving.convert("RGB"), int)).mean() < 12


def test_show_says_what_is_wrong_with_clips(tokenreduce, picture, tmp_path) -> None:
    pytest.importorskip("av", reason="the extra 'video' is missing")
    clip = qwen_files.write_clip(tmp_path / "clip.mp4", qwen_files.shapes(40, 28, 28), rate=10)
    for arguments, message in (
        ((picture, "--output", "x.gif"), "a picture does not move"),
        ((clip, "--fps", 100), "more than 256 frames"),
        ((clip,), "this model takes no clips"),
    ):
        result = tokenreduce("show", "testbed:b", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
