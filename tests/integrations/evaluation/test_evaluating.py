"""Evaluations that are killed and continued, shared by processes, or refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokenreduce as tr
from tokenreduce.errors import EvaluationError, PipelineError, StageNotEngaged
from tokenreduce_integrations.evaluation import evaluating
from tokenreduce_integrations.evaluation.answering import Answer, Answerer
from tokenreduce_integrations.evaluation.cached import CachedAnswerer, Captured
from tokenreduce_integrations.evaluation.data import Questions, Sample
from tokenreduce_integrations.evaluation.evaluating import Processes, is_correct
from tokenreduce_integrations.evaluation.schema import Header, read_header, read_rows
from tokenreduce_integrations.evaluation.summaries import summary_of

from .conftest import pipeline

LFTR = {"strategy": "lftr", "reduction": 8}


@pytest.fixture(scope="module")
def answerer(model_and_processor: tuple[Any, Any], questions: Questions) -> Answerer:
    answer = CachedAnswerer(Captured(*model_and_processor, ()), pipeline(LFTR).stages)
    for batch in evaluating.batches(questions, 4):
        answer(batch)
    return answer


@pytest.fixture
def header(questions: Questions) -> Header:
    settings = evaluating.settings_of(
        batch_size=4, max_new_tokens=1, scoring="exact", reduced=True, cached=True, device="cpu"
    )
    return evaluating.header_of(pipeline(LFTR), questions, settings)


def contents(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, but for the times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def killed_after(seconds: float, work: Callable[[], object]) -> None:
    """Do some work in a process that is killed."""
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, of which the child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_killed_at_random_ten_times(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path
) -> None:
    straight, file = tmp_path / "straight.jsonl", tmp_path / "killed.jsonl"
    began = time.perf_counter()
    evaluating.evaluate(lambda: answerer, questions, header, straight)
    took = time.perf_counter() - began

    def slowly(samples: Sequence[Sample]) -> list[Answer]:
        time.sleep(took / 10)
        return answerer(samples)

    generator = random.Random(0)
    sizes = []
    for _ in range(10):
        killed_after(
            generator.uniform(0, took / 2),
            lambda: evaluating.evaluate(lambda: slowly, questions, header, file),
        )
        sizes.append(file.stat().st_size if file.exists() else 0)
    assert sizes == sorted(sizes)
    evaluating.evaluate(lambda: answerer, questions, header, file)
    assert contents(file) == contents(straight)
    assert len(list(read_rows(file))) == len(questions.samples)
    assert all(row.receipt["tokens_out"] == 18 for row in read_rows(file))


@pytest.mark.parametrize("seed", range(5))
def test_torn_anywhere(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path, seed: int
) -> None:
    file = tmp_path / "results.jsonl"
    evaluating.evaluate(lambda: answerer, questions, header, file)
    whole = contents(file)
    data = file.read_bytes()
    cuts = random.Random(seed).sample(range(len(data)), 4)
    for cut in (*cuts, 0, 10, len(data) - 1):
        file.write_bytes(data[:cut])
        evaluating.evaluate(lambda: answerer, questions, header, file)
        assert contents(file) == whole


def test_a_finished_evaluation_asks_nothing(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path
) -> None:
    file = tmp_path / "deeper" / "results.jsonl"
    done: list[float] = []
    rows = evaluating.evaluate(lambda: answerer, questions, header, file, progress=done.append)
    assert done[-1] == len(questions.samples)

    def never() -> Answerer:
        raise AssertionError

    assert evaluating.evaluate(never, questions, header, file) == rows
    assert read_header(file) == header
    assert [row.id for row in rows] == [sample.id for sample in questions.samples]
    summary = summary_of(rows)
    assert summary.tokens.tokens_out == summary.tokens.layer_average == 18
    assert summary.as_dict()["accuracy"]["value"] == summary.accuracy.value
    assert summary.micro.value == sum(row.correct for row in rows) / len(rows)


def test_another_evaluation_is_refused(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path
) -> None:
    file = tmp_path / "results.jsonl"
    evaluating.evaluate(lambda: answerer, questions, header, file)
    before = file.read_bytes()
    for change, message in (
        ({"pipeline_digest": "other"}, "pipeline_digest"),
        ({"data_digest": "other"}, "data_digest"),
        ({"versions": {**header.versions, "torch": "0"}}, "versions"),
        ({"settings": {**header.settings, "batch_size": 5}}, "settings"),
    ):
        with pytest.raises(EvaluationError, match=f"begun with another {message}"):
            evaluating.evaluate(lambda: answerer, questions, replace(header, **change), file)
    assert file.read_bytes() == before
    lines = before.splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], lines[2]]))
    with pytest.raises(EvaluationError, match=r"line 4.*twice"):
        evaluating.evaluate(lambda: answerer, questions, header, file)
    file.write_bytes(b"".join([lines[0], b"torn\n", *lines[2:]]))
    with pytest.raises(EvaluationError, match="line 2"):
        evaluating.evaluate(lambda: answerer, questions, header, file)


def test_two_writers_are_refused(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path
) -> None:
    file = tmp_path / "results.jsonl"

    def meanwhile(samples: Sequence[Sample]) -> list[Answer]:
        with pytest.raises(EvaluationError, match="another process"):
            evaluating.evaluate(lambda: answerer, questions, header, file)
        return answerer(samples)

    evaluating.evaluate(lambda: meanwhile, questions, header, file)
    with pytest.raises(EvaluationError, match="cannot be written"):
        evaluating.evaluate(lambda: answerer, questions, header, tmp_path)


class _One(Processes):
    """One of two processes, which run one after the other."""

    def __init__(self, index: int) -> None:
        self._index = index

    @property
    def index(self) -> int:
        return self._index

    @property
    def count(self) -> int:
        return 2

    def wait(self, failure: Any = None) -> None:
        raise InterruptedError


def test_parts_of_processes_are_merged(
    answerer: Answerer, questions: Questions, header: Header, tmp_path: Path
) -> None:
    straight, file = tmp_path / "straight.jsonl", tmp_path / "shared.jsonl"
    evaluating.evaluate(lambda: answerer, questions, header, straight)
    for index in (1, 0):
        with pytest.raises(InterruptedError):
            evaluating.evaluate(lambda: answerer, questions, header, file, processes=_One(index))
    parts = sorted(tmp_path.glob("shared.jsonl.part*"))
    assert len(parts) == 2
    # One is torn: what it lost is asked again by a single process.
    parts[1].write_bytes(parts[1].read_bytes()[:-50])
    evaluating.evaluate(lambda: answerer, questions, header, file)
    assert contents(file) == contents(straight)
    assert list(tmp_path.glob("shared.jsonl.*")) == []


def test_batches_keep_pictures_whole(questions: Questions) -> None:
    for size in (1, 4, 9, 1000):
        made = list(evaluating.batches(questions, size))
        assert [s for batch in made for s in batch] == list(questions.samples)
        groups = [{s.group for s in batch} for batch in made]
        assert sum(map(len, groups)) == len(questions.groups)
        assert all(len(batch) >= size for batch in made[:-1])


def test_what_did_nothing_fails(
    model_and_processor: tuple[Any, Any], questions: Questions, header: Header, tmp_path: Path
) -> None:
    captured = Captured(*model_and_processor, ())
    lazy = pipeline({"strategy": "lftr", "keep": 144}, LFTR)
    with pytest.raises(StageNotEngaged, match=r"'lftr' at .* none of the .*within the budget"):
        evaluating.evaluate(
            lambda: CachedAnswerer(captured, lazy.stages), questions, header, tmp_path / "lazy"
        )
    unreduced = replace(header, settings={**header.settings, "reduced": False})
    evaluating.evaluate(
        lambda: CachedAnswerer(captured, lazy.stages, reduced=False),
        questions,
        unreduced,
        tmp_path / "unreduced",
    )


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "contains"),
    [
        ("red", ("red",), True, True),
        (" Red. ", ("crimson", "red"), True, True),
        ("it is red", ("red",), False, True),
        ("reddish", ("red",), False, False),
        ("top left", ("Top  left",), True, True),
        ("", ("red",), False, False),
    ],
)
def test_scoring(prediction: str, answers: tuple[str, ...], exact: bool, contains: bool) -> None:
    assert is_correct(prediction, answers, "exact") == exact
    assert is_correct(prediction, answers, "contains") == contains


def test_settings_out_of_range_are_refused(questions: Questions, header: Header) -> None:
    fine = {"max_new_tokens": 1, "reduced": True, "cached": True, "device": "cpu"}
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluating.settings_of(batch_size=0, scoring="exact", **fine)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="'fuzzy'"):
        evaluating.settings_of(batch_size=1, scoring="fuzzy", **fine)  # type: ignore[arg-type]
    bare = tr.load_pipeline({"reduce": [LFTR]})
    with pytest.raises(PipelineError, match="names no model"):
        evaluating.header_of(bare, questions, header.settings)
