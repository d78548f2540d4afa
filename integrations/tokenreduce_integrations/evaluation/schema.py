"""What evaluations and comparisons say, as data that other tools may read.

An evaluation is a file of JSON lines: a header, then one row for each sample, in the order of the
data. A comparison is a folder: ``comparison.json``, and such a file for each pipeline. Both carry
the name of their schema and its version; a reader refuses what it does not know. Within a version,
fields are only added, with a default.

    comparison = read_comparison("results")
    for run in comparison.runs:
        print(run.name, run.accuracy, run.tokens.tokens_out)
        for row in comparison.rows(run):
            print(row.id, row.question, row.prediction, row.correct, row.receipt["tokens_out"])
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

from tokenreduce.errors import EvaluationError

EVALUATION: Final = "tokenreduce.evaluation"
COMPARISON: Final = "tokenreduce.comparison"
VERSION: Final = 1
COMPARISON_FILE: Final = "comparison.json"

#: The stretches that an answer's time is split into.
PARTS: Final = ("encoder", "selection", "prefill", "decode")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line of an evaluation: what must agree before it may be continued.

    Attributes:
        pipeline: the pipeline as YAML.
        pipeline_digest: SHA-256 of that, and of what the model's path holds.
        data: the data, as it was asked for.
        data_digest: SHA-256 of ids, questions, answers and pictures.
        settings: batch size, longest answer, scoring, whether tokens were reduced at all.
        versions: of Python and the libraries that answers depend on.
        samples: how many rows a complete evaluation has.
    """

    pipeline: str
    pipeline_digest: str
    data: str
    data_digest: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    samples: int
    schema: str = EVALUATION
    version: int = VERSION


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample.

    Attributes:
        id: unique within the data.
        group: what questions that are not independent share: the picture or clip.
        kind: the type of the question; an empty string where the data has none.
        modality: ``"image"`` or ``"video"``.
        media: where the picture or clip comes from: ``{"path": ...}``, relative to the data's
            folder where it lies inside; ``{"testbed": "image", "seed": ..., "index": ...}`` for a
            rendered scene; ``{"dataset": ..., "index": ...}`` for a row of a data set.
        question: as it was asked.
        answer: the reference.
        alternatives: other answers that count as right.
        prediction: what the model said.
        correct: whether that counts as right.
        receipt: what was reduced, as :meth:`tokenreduce.Receipt.as_dict` says it, for this sample
            alone (its ``prompt`` is 0); without ``selection_ms``, which is in ``seconds``.
        seconds: this sample's share of the time of its batch, by :data:`PARTS`.
    """

    id: str
    group: str
    kind: str
    modality: str
    media: Mapping[str, Any]
    question: str
    answer: str
    alternatives: tuple[str, ...] = ()
    prediction: str
    correct: bool
    receipt: Mapping[str, Any]
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, kw_only=True)
class Versus:
    """A run minus another one, on the same questions.

    Attributes:
        other: name of the other run.
        difference: of the accuracies (macro averages), with the paired interval.
        wins: questions that only this run answers right.
        losses: questions that only the other one answers right.
        test: ``"mcnemar"`` where every question has its own picture, else ``"sign-flip"``, a
            permutation test that swaps whole pictures.
        p: two-sided, of this comparison by itself.
        p_holm: corrected for all comparisons of the document.
    """

    other: str
    difference: Estimate
    wins: int
    losses: int
    test: str
    p: float
    p_holm: float


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Realised visual tokens, from the receipts.

    Attributes:
        tokens_in: mean over samples.
        tokens_out: mean over samples of what the last stage leaves.
        layer_average: mean over samples and LLM layers.
        least: fewest that a sample was left with.
        most: most that a sample was left with.
    """

    tokens_in: float
    tokens_out: float
    layer_average: float
    least: int
    most: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one prompt costs, measured by itself on the pipeline as it runs.

    Attributes:
        flops: of the first token, by part, and in ``"total"``.
        kv_bytes: keys and values of the visual tokens; None if their size is not known.
        times_ms: medians by :data:`PARTS`, and ``"first_token"``.
        decode_tokens: generated tokens that ``times_ms["decode"]`` is the mean of.
    """

    flops: Mapping[str, int]
    kv_bytes: int | None
    times_ms: Mapping[str, float]
    decode_tokens: int


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Accuracy on one type of question."""

    accuracy: float
    questions: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pipeline on the data.

    Attributes:
        name: unique within the comparison.
        role: ``"strategy"``, ``"control"``, or ``"unreduced"`` for the model with all tokens.
        strategy: names of the strategies, joined by `` + ``; empty for the unreduced model.
        sites: of the stages, in order.
        budget: of the stages as written, joined by `` + ``, such as ``"reduction=8"``; runs with
            equal budgets on equal models are held against each other.
        pipeline: as YAML.
        digest: that of the evaluation's header.
        rows: the file of the rows, relative to the folder of the comparison.
        model: where the model comes from.
        accuracy: mean over question types of the accuracy.
        micro: accuracy over all questions.
        share: accuracy as a share of the unreduced one; None for that itself.
        kinds: by question type.
        tokens: realised tokens.
        cost: None if it was not measured.
        versus: the unreduced run of the same model, then controls of the same budget.
    """

    name: str
    role: str
    strategy: str
    sites: tuple[str, ...]
    budget: str
    pipeline: str
    digest: str
    rows: str
    model: str
    accuracy: Estimate
    micro: Estimate
    share: Estimate | None = None
    kinds: Mapping[str, Kind]
    tokens: TokenCounts
    cost: Cost | None = None
    versus: tuple[Versus, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A pipeline that was asked for and cannot run.

    Attributes:
        name: what the run would have been called.
        strategy: as for :class:`Run`.
        sites: likewise.
        reason: the message of the error.
    """

    name: str
    strategy: str
    sites: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a comparison.

    Attributes:
        source: as it was asked for.
        digest: as in :class:`Header`.
        modality: ``"image"``, ``"video"``, or both joined by a comma.
        samples: questions.
        groups: pictures or clips.
        folder: what relative paths of media are relative to; empty where there are none.
    """

    source: str
    digest: str
    modality: str
    samples: int
    groups: int
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the figures were made.

    Attributes:
        confidence: coverage of the intervals.
        resamples: bootstrap resamples of whole pictures.
        flips: permutations of a sign-flip test.
        seed: of both.
        independent: whether every question has its own picture.
        correction: for many comparisons.
        cost_rounds: interleaved measurements that times are medians of; 0 if none was made.
    """

    confidence: float
    resamples: int
    flips: int
    seed: int
    independent: bool
    correction: str
    cost_rounds: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pipelines on the same data.

    Attributes:
        data: what was asked.
        method: how the figures were made.
        device: the machine, in words.
        versions: of Python and the libraries.
        runs: in the order that they were asked for, the unreduced model first.
        refused: what cannot run, with the reason.
        pareto: for each of ``"tokens"``, ``"flops"`` and ``"time"`` the names of the runs that no
            other one beats in accuracy at equal or lower cost, by ascending cost.
        folder: where it was read from; not part of the document.
    """

    data: Data
    method: Method
    device: str
    versions: Mapping[str, str]
    runs: tuple[Run, ...]
    refused: tuple[Refusal, ...] = ()
    pareto: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    schema: str = COMPARISON
    version: int = VERSION
    folder: Path = field(default=Path(), compare=False)

    def run(self, name: str) -> Run:
        """The run of a name.

        Raises:
            EvaluationError: if there is none.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise EvaluationError(f"the comparison has no run {name!r}.")

    def rows(self, run: Run) -> Iterator[Row]:
        """The samples of a run.

        Raises:
            EvaluationError: if the file is missing or malformed.
        """
        return read_rows(self.folder / run.rows)

    def as_dict(self) -> dict[str, Any]:
        """The document, schema and version first."""
        document = {name: value for name, value in asdict(self).items() if name != "folder"}
        return {"schema": document.pop("schema"), "version": document.pop("version"), **document}


def read_comparison(path: str | Path) -> Comparison:
    """Read a comparison.

    Args:
        path: its folder, or the JSON document.

    Raises:
        EvaluationError: if it is missing, malformed, or of another schema or version.
    """
    file = Path(path)
    if file.is_dir():
        file /= COMPARISON_FILE
    document = _parsed(_text(file), str(file))
    _require(document, COMPARISON, str(file))
    return _decoded(Comparison, {**document, "folder": file.parent}, str(file))


def read_header(path: str | Path) -> Header:
    """Read the first line of an evaluation.

    Raises:
        EvaluationError: as for :func:`read_rows`.
    """
    first, _, _ = _text(Path(path)).partition("\n")
    return header_of(first, str(path))


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the samples of an evaluation.

    Raises:
        EvaluationError: if it is missing, malformed, or of another schema or version.
    """
    first, *lines = _text(Path(path)).splitlines()
    header_of(first, str(path))
    for number, line in enumerate(lines, start=2):
        yield row_of(line, f"{path}, line {number}")


def header_of(line: str, place: str) -> Header:
    """A header from its line.

    Raises:
        EvaluationError: if it is malformed, or of another schema or version.
    """
    document = _parsed(line, place)
    _require(document, EVALUATION, place)
    return _decoded(Header, document, place)


def row_of(line: str, place: str) -> Row:
    """A row from its line.

    Raises:
        EvaluationError: if it is malformed.
    """
    return _decoded(Row, _parsed(line, place), place)


def line_of(entry: Header | Row) -> str:
    """A header or a row as one line, with its end."""
    values = {f.name: getattr(entry, f.name) for f in fields(entry)}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")) + "\n"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}.") from error


def _parsed(text: str, place: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise EvaluationError(f"{place}: is not JSON: {error}.") from error
    if not isinstance(document, dict):
        raise EvaluationError(f"{place}: must be an object, got {type(document).__name__}.")
    return document


def _require(document: Mapping[str, Any], schema: str, place: str) -> None:
    found = document.get("schema"), document.get("version")
    if found != (schema, VERSION):
        raise EvaluationError(
            f"{place}: has the schema {found[0]!r}, version {found[1]!r}; this release reads "
            f"{schema!r}, version {VERSION}."
        )


def _decoded(owner: type[_T], document: Mapping[str, Any], place: str) -> _T:
    """A dataclass from plain data, nested ones included.

    Raises:
        EvaluationError: if a field is missing or unknown.
    """
    hints: dict[str, Any] = _hints(owner)  # type: ignore[arg-type]
    for name in document:
        if name not in hints:
            raise EvaluationError(f"{place}: {owner.__name__} has no field {name!r}.")
    try:
        return owner(**{name: _value(hints[name], v, place) for name, v in document.items()})
    except TypeError as error:
        raise EvaluationError(f"{place}: {error}.") from error


@cache
def _hints(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def _value(hint: Any, value: Any, place: str) -> Any:
    if get_origin(hint) in (Union, UnionType):
        [hint] = [part for part in get_args(hint) if part is not NoneType]
        return None if value is None else _value(hint, value, place)
    if is_dataclass(hint):
        return _decoded(hint, value, place)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        return tuple(_value(get_args(hint)[0], item, place) for item in value)
    if get_origin(hint) is Mapping:
        return {name: _value(get_args(hint)[1], item, place) for name, item in value.items()}
    return value
