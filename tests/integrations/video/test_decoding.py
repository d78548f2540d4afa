"""Decoding: frames at regular times, and files that are not what they should be."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from support.qwen_files import shapes, write_clip, write_sound
from tokenreduce.errors import MediaError, MissingExtra
from tokenreduce_integrations.video.decoding import VideoFile


def levels(count: int) -> list[np.ndarray]:
    """Grey pictures that tell their number."""
    return [np.full((48, 64, 3), 16 + 8 * number, np.uint8) for number in range(count)]


def numbers(path: Path, fps: float) -> list[int]:
    return [round((float(f.mean()) - 16) / 8) for f in VideoFile(path).frames(fps)]


@pytest.fixture(autouse=True)
def _needs_av() -> None:
    pytest.importorskip("av", reason="the extra 'video' is missing")


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(5, list(range(20))), (1, [0, 5, 10, 15]), (2.5, list(range(0, 20, 2))), (0.1, [0])],
)
def test_frames_at_regular_times(tmp_path, fps, expected) -> None:
    path = write_clip(tmp_path / "clip.mp4", levels(20))
    assert numbers(path, fps) == expected
    assert VideoFile(path).count(fps) == len(expected)


def test_a_variable_rate_gives_the_latest_picture(tmp_path) -> None:
    path = write_clip(tmp_path / "clip.mkv", levels(5), times=[0, 1, 2, 12, 13])
    assert numbers(path, 5) == [0, 1, *[2] * 10, 3, 4]
    assert VideoFile(path).count(5) == 14


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "mov"])
def test_pictures_are_counted_without_decoding(tmp_path, kind) -> None:
    file = VideoFile(write_clip(tmp_path / f"clip.{kind}", shapes(23, 48, 64)))
    for fps in (0.3, 1, 2.7, 5, 30):
        assert file.count(fps) == len(list(file.frames(fps)))


def test_a_clip_of_one_picture(tmp_path) -> None:
    assert numbers(write_clip(tmp_path / "clip.mp4", levels(1)), 2) == [0]


def test_two_passes_are_alike(tmp_path) -> None:
    file = VideoFile(write_clip(tmp_path / "clip.mp4", shapes(12, 48, 64)))
    for one, other in zip(file.frames(2), file.frames(2), strict=True):
        assert np.array_equal(one, other)


def test_what_is_no_clip_is_one_message(tmp_path) -> None:
    whole = write_clip(tmp_path / "clip.mp4", shapes(60, 96, 128)).read_bytes()
    cases = {
        "text.mp4": (b"no clip at all", "cannot be decoded"),
        "empty.mp4": (b"", "cannot be decoded"),
        "half.mp4": (whole[: len(whole) // 2], "cannot be decoded"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match=message):
            list(VideoFile(tmp_path / name).frames(1))
    with pytest.raises(MediaError, match="cannot be decoded"):
        VideoFile(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="holds no pictures"):
        VideoFile(write_sound(tmp_path / "sound.wav"))


def test_a_file_that_ends_early_is_refused(tmp_path) -> None:
    whole = write_clip(tmp_path / "clip.mkv", shapes(100, 96, 128))
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"pictures end at|cannot be decoded"):
        list(VideoFile(cut).frames(1))


def test_without_the_package_the_command_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tokenreduce\[video\]'"):
        VideoFile(tmp_path / "clip.mp4")
