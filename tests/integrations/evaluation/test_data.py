"""Sources of questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.evaluation.data import (
    Questions,
    Sample,
    load_questions,
    open_reference,
)
from tokenreduce_integrations.testbed.scenes import SceneGenerator


def picture(path: Path, color: str) -> None:
    Image.new("RGB", (8, 8), color).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of questions about two pictures and one clip."""
    for color in ("red", "blue"):
        picture(tmp_path / f"{color}.png", color)
    (tmp_path / "clip").mkdir()
    for number in range(3):
        picture(tmp_path / "clip" / f"{number}.png", "green")
    lines: list[dict[str, Any]] = [
        {"image": "red.png", "question": "which color ?", "answer": ["red", "crimson"]},
        {"image": "blue.png", "question": "which color ?", "answer": "blue", "kind": "color"},
        {"video": "clip", "question": "does it move ?", "answer": "no", "id": "still"},
        {"image": "red.png", "question": "how many ?", "answer": 1},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "data.jsonl").write_text(f"{text}\n\n")
    return tmp_path


def frames(sample: Sample) -> list[np.ndarray]:
    return [np.array(frame) for frame in sample.read().frames]


def test_the_testbed_is_reproducible() -> None:
    first, again = (load_questions("testbed,seed=4,scenes=3") for _ in range(2))
    assert first.samples == again.samples
    assert first.digest == again.digest
    assert len(first.groups) == 3
    assert first.answer_tokens == 1
    assert {s.id for s in first.samples} == {s.id for s in again.samples}
    sample = first.samples[-1]
    expected = SceneGenerator(4, "test").scene(2).image
    assert np.array_equal(frames(sample)[0], expected)
    [seen] = open_reference(sample.media).frames
    assert np.array_equal(np.array(seen), expected)
    assert load_questions("testbed,seed=5,scenes=3").digest != first.digest
    [clip] = load_questions("testbed-video,seed=4,scenes=1", limit=1).samples
    assert (clip.modality, len(frames(clip))) == ("video", 8)
    assert np.array_equal(frames(clip), [np.array(f) for f in open_reference(clip.media).frames])
    counts = load_questions("testbed,seed=4,scenes=3,kinds=count+color")
    assert {s.kind for s in counts.samples} == {"count", "color"}


@pytest.mark.parametrize("name", ["", "data.jsonl"])
def test_a_file_of_questions(folder: Path, name: str) -> None:
    found = load_questions(str(folder / name))
    assert [s.id for s in found.samples] == ["0", "3", "1", "still"]
    assert [s.group for s in found.samples] == ["red.png", "red.png", "blue.png", "clip"]
    red, count, blue, clip = found.samples
    assert (red.answers, count.answers, blue.kind) == (("red", "crimson"), ("1",), "color")
    assert (clip.modality, len(frames(clip))) == ("video", 3)
    assert frames(blue)[0][0, 0].tolist() == [0, 0, 255]
    [seen] = open_reference(blue.media, found.folder).frames
    assert np.array_equal(np.array(seen), frames(blue)[0])
    assert load_questions(str(folder / name), limit=2).samples == found.samples[:2]
    assert found.first(None) is found


def test_the_digest_is_of_pictures_too(folder: Path) -> None:
    before = load_questions(str(folder)).digest
    assert load_questions(str(folder)).digest == before
    picture(folder / "blue.png", "white")
    assert load_questions(str(folder)).digest != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[]", "must be an object"),
        ('{"image": "red.png", "question": "?", "answer": "a", "colour": 1}', "'colour'"),
        ('{"question": "?", "answer": "a"}', "exactly one of"),
        ('{"image": "gone.png", "question": "?", "answer": "a"}', "no such file"),
        ('{"image": "red.png", "question": " ", "answer": "a"}', "'question' must be text"),
        ('{"image": "red.png", "question": "?", "answer": []}', "'answer' must be"),
        ("", "has no question"),
        (
            '{"image": "red.png", "question": "?", "answer": "a", "id": 1}\n' * 2,
            "'1' occurs twice",
        ),
    ],
)
def test_a_malformed_file_is_refused(folder: Path, line: str, message: str) -> None:
    (folder / "data.jsonl").write_text(line)
    with pytest.raises(EvaluationError, match=message):
        load_questions(str(folder))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("tesbed", "'testbed'"),
        ("testbed,seed=x", "whole number"),
        ("testbed,sead=1", "'seed'"),
        ("testbed,scenes", "not 'key=value'"),
        ("testbed,scenes=0", "has no question"),
        ("hf:/nowhere", "cannot be opened"),
    ],
)
def test_unknown_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        load_questions(source)


@pytest.mark.parametrize("stored", ["save_to_disk", "parquet"])
def test_a_data_set(folder: Path, stored: str) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional extra")
    colors = ["red", "blue", "red"]
    rows = datasets.Dataset.from_dict(
        {
            "image": [str(folder / f"{color}.png") for color in colors],
            "text": [f"question {i} ?" for i in range(3)],
            "answer": colors,
        }
    ).cast_column("image", datasets.Image())
    path = folder / "set"
    if stored == "parquet":
        path.mkdir()
        rows.to_parquet(path / "test.parquet")
    else:
        datasets.DatasetDict({"test": rows}).save_to_disk(path)
    found: Questions = load_questions(f"hf:{path},question=text")
    assert [s.question for s in found.samples] == ["question 0 ?", "question 2 ?", "question 1 ?"]
    assert [s.group for s in found.samples] == ["0", "0", "1"]
    assert frames(found.samples[-1])[0][0, 0].tolist() == [0, 0, 255]
    [seen] = open_reference(found.samples[-1].media).frames
    assert np.array_equal(np.array(seen), frames(found.samples[-1])[0])
    assert len(load_questions(f"hf:{path},question=text", limit=2).samples) == 2
    with pytest.raises(EvaluationError, match="no column 'question'"):
        load_questions(f"hf:{path}")
    with pytest.raises(EvaluationError, match="cannot be opened"):
        load_questions(f"hf:{path},split=train,question=text")
