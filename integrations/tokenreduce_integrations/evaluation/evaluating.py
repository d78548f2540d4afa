"""Asking a pipeline every question of some data, once each, whatever interrupts it."""

from __future__ import annotations

import hashlib
import platform
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import tokenreduce
from tokenreduce.config import dump_pipeline
from tokenreduce.errors import (
    EvaluationError,
    PipelineError,
    StageNotEngaged,
    TokenReduceError,
)
from tokenreduce.pipeline import ModelSettings, Pipeline
from tokenreduce_integrations.evaluation.answering import Answerer, AttachedAnswerer
from tokenreduce_integrations.evaluation.data import Questions, Sample
from tokenreduce_integrations.evaluation.results import Results
from tokenreduce_integrations.evaluation.schema import Header, Row

BATCH_SIZE: Final = 16
MAX_NEW_TOKENS: Final = 32
#: How a prediction is held against the accepted answers.
SCORINGS: Final = ("exact", "contains")

#: Files of a model up to this size are read whole for the digest, of larger ones the end alone.
_READ_WHOLE: Final = 2**26
_READ_END: Final = 2**20

Progress = Callable[[float], None]


class Processes:
    """Which of several processes this is, as a launcher says; one by itself without one.

    Args:
        cpu: whether the model runs on the CPU.
    """

    def __init__(self, *, cpu: bool = False) -> None:
        from accelerate import PartialState

        self._state = PartialState(cpu=cpu)

    @property
    def index(self) -> int:
        return int(self._state.process_index)

    @property
    def count(self) -> int:
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def wait(self, failure: TokenReduceError | None = None) -> None:
        """Wait until every process is here.

        Args:
            failure: what went wrong in this one.

        Raises:
            TokenReduceError: what went wrong in the first of those in which something did.
        """
        from accelerate.utils import gather_object

        failures = [found for found in gather_object([failure]) if found is not None]
        if failures:
            # The same one everywhere, so that all go on alike.
            raise failures[0]

    def on_own_device(self, model: ModelSettings) -> ModelSettings:
        """The settings with this process' device, where several share the machine."""
        if self.count == 1 or model.device != "auto":
            return model
        return replace(model, device=str(self._state.device))


def settings_of(
    *,
    batch_size: int,
    max_new_tokens: int,
    scoring: str,
    reduced: bool,
    cached: bool,
    device: str,
) -> dict[str, Any]:
    """What answers depend on beside pipeline and data.

    Raises:
        EvaluationError: if a value is out of range.
    """
    if batch_size < 1 or max_new_tokens < 1:
        raise EvaluationError("batch size and longest answer must be at least 1.")
    if scoring not in SCORINGS:
        raise EvaluationError(f"scoring {scoring!r}: one of {', '.join(SCORINGS)}.")
    return {
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "scoring": scoring,
        "reduced": reduced,
        "encoded": "once a picture" if cached else "with each question",
        "device": device,
    }


def header_of(pipeline: Pipeline, questions: Questions, settings: Mapping[str, Any]) -> Header:
    """What an evaluation is of.

    Raises:
        PipelineError: if the pipeline names no model, or cannot be written down.
    """
    written = dump_pipeline(pipeline)
    digest = hashlib.sha256(written.encode())
    if pipeline.model is None:
        raise PipelineError("this pipeline names no model: add 'model: {path: ...}'.")
    digest.update(_model_digest(pipeline.model.path))
    return Header(
        pipeline=written,
        pipeline_digest=digest.hexdigest(),
        data=questions.source,
        data_digest=questions.digest,
        settings=settings,
        versions=versions(),
        samples=len(questions.samples),
    )


def versions() -> dict[str, str]:
    """Of Python and the libraries that answers depend on."""
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenreduce": tokenreduce.__version__,
    }


def evaluate(
    answerer: Callable[[], Answerer],
    questions: Questions,
    header: Header,
    path: Path,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Answer every question that is not answered yet, and write each to a file.

    Args:
        answerer: makes what answers; called only if something is left to do.
        questions: what to ask.
        header: of the evaluation.
        path: the file of the results; one of an evaluation that was interrupted is continued.
        processes: shares the batches among processes; all of them call this.
        progress: called with the number of this process' answered questions.

    Returns:
        a row for each question, in order.

    Raises:
        EvaluationError: if the file belongs to another evaluation.
        StageNotEngaged: if a stage reduced nothing at all.
        TokenReduceError: as the pipeline raises.
    """
    processes = processes or Processes()
    ids = [sample.id for sample in questions.samples]
    scoring = header.settings["scoring"]
    answer: Answerer | None = None
    with Results(path, header, ids, process=processes.index, processes=processes.count) as results:
        done = 0
        failure = None
        every = list(batches(questions, header.settings["batch_size"]))
        try:
            for batch in every[processes.index :: processes.count]:
                missing = [sample for sample in batch if sample.id not in results.rows]
                if missing:
                    answer = answer or answerer()
                    # The whole batch, as if it had never been interrupted: equal batches give
                    # equal answers.
                    rows = _rows(answer, batch, scoring)
                    results.append([rows[sample.id] for sample in missing])
                done += len(batch)
                if progress is not None:
                    progress(done)
        except TokenReduceError as error:
            failure = error
        processes.wait(failure)
        if processes.is_main:
            results.merge()
        processes.wait()
        rows_in_order = results.finished()
    if header.settings["reduced"]:
        require_engaged(rows_in_order)
    return rows_in_order


def batches(questions: Questions, size: int) -> Iterator[list[Sample]]:
    """Questions of whole pictures, at least ``size`` of them but for the last batch."""
    batch: list[Sample] = []
    for _, group in groupby(questions.samples, key=lambda sample: sample.group):
        batch += group
        if len(batch) >= size:
            yield batch
            batch = []
    if batch:
        yield batch


def is_correct(prediction: str, answers: Sequence[str], scoring: str) -> bool:
    """Whether a prediction counts as right.

    Args:
        prediction: what the model said.
        answers: accepted answers.
        scoring: ``"exact"``: it is one of them, but for case, punctuation around it and spaces;
            ``"contains"``: one of them stands in it as whole words.
    """
    said = _normal(prediction)
    accepted = [_normal(answer) for answer in answers]
    if scoring == "exact":
        return said in accepted
    return any(f" {answer} " in f" {said} " for answer in accepted)


def require_engaged(rows: Sequence[Row]) -> None:
    """Check that every stage reduced something somewhere.

    Raises:
        StageNotEngaged: naming the stage, and why it did nothing.
    """
    engaged: dict[tuple[int, str, str], bool] = {}
    reasons: dict[str, None] = {}
    for row in rows:
        items = row.receipt["items"]
        if not items:
            raise StageNotEngaged(
                f"sample {row.id}: its receipt shows no visual item: nothing was reduced."
            )
        for item in items:
            for number, stage in enumerate(item["stages"]):
                key = (number, stage["strategy"], stage["site"])
                reduced = stage["tokens_out"] < stage["tokens_in"]
                engaged[key] = engaged.get(key, False) or reduced
                if stage["reason"]:
                    reasons[stage["reason"]] = None
    for (_, strategy, site), reduced in engaged.items():
        if not reduced:
            why = "; ".join(list(reasons)[:3]) or "no reason was given"
            raise StageNotEngaged(
                f"strategy {strategy!r} at the site {site!r} reduced none of the {len(rows)} "
                f"samples ({why}): this would be an evaluation of the unreduced model. Give it "
                "a smaller budget, or use --no-reduction to evaluate the model as it is."
            )


@contextmanager
def attached(
    pipeline: Pipeline, *, max_new_tokens: int, reduced: bool
) -> Iterator[Callable[[], AttachedAnswerer]]:
    """A pipeline on its model, which is loaded when it is first asked for."""
    made: list[Any] = []

    def make() -> AttachedAnswerer:
        model, processor, run = pipeline.build()
        made.append(run)
        run.enabled = reduced
        return AttachedAnswerer(model, processor, run, max_new_tokens=max_new_tokens)

    try:
        yield make
    finally:
        for run in made:
            run.detach()


def _rows(answer: Answerer, batch: Sequence[Sample], scoring: str) -> dict[str, Row]:
    return {
        sample.id: Row(
            id=sample.id,
            group=sample.group,
            kind=sample.kind,
            modality=sample.modality,
            media=sample.media,
            question=sample.question,
            answer=sample.answers[0],
            alternatives=sample.answers[1:],
            prediction=given.text,
            correct=is_correct(given.text, sample.answers, scoring),
            receipt=given.receipt,
            seconds=given.seconds,
        )
        for sample, given in zip(batch, answer(batch), strict=True)
    }


def _normal(text: str) -> str:
    words = (word.strip(string.punctuation) for word in text.casefold().split())
    return " ".join(filter(None, words))


@cache
def _model_digest(path: str) -> bytes:
    """What tells the models of a folder apart; nothing for a model of a hub."""
    from tokenreduce_integrations.transformers.files import resolve_path

    digest = hashlib.sha256()
    folder = Path(resolve_path(path))
    files = folder.rglob("*") if folder.is_dir() else ()
    for file in sorted(found for found in files if found.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with file.open("rb") as opened:
            if size > _READ_WHOLE:
                opened.seek(size - _READ_END)
            digest.update(opened.read())
    return digest.digest()
