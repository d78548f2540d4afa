"""Questions about pictures and clips: rendered scenes, a file of your own, or a data set.

A source is written ``NAME`` or ``NAME,key=value,...``:

- ``testbed`` and ``testbed-video``: scenes and clips that the package renders;
  ``seed=30101``, ``scenes=130`` (pictures or clips), ``kinds=color+count``.
- a JSONL file, or a folder with ``data.jsonl``: one object a line with ``image`` or ``video`` (a
  path relative to the file), ``question`` and ``answer`` (text, or a list of accepted answers), and
  optionally ``id``, ``group`` and ``kind``.
- ``hf:NAME``: a Hugging Face data set by its hub name or folder, or what ``save_to_disk`` wrote;
  ``split=test``; ``image=``, ``question=``, ``answer=``, ``kind=`` and ``id=`` name its columns.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image

from tokenreduce.errors import EvaluationError, MediaError, MissingExtra, did_you_mean
from tokenreduce_integrations.cli.chat import Media, open_media, open_video_file

Modality = Literal["image", "video"]

FILE: Final = "data.jsonl"
HUB: Final = "hf:"
#: Frames of a video file that are shown to a model, evenly spaced.
VIDEO_FRAMES: Final = 8

_SEED, _SCENES = 30101, 130


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
        id: unique within the data.
        group: what questions about one picture or clip share.
        kind: type of the question; empty where the data has none.
        modality: what it is about.
        media: where that comes from, as :class:`~.schema.Row` says it.
        question: as it is asked.
        answers: accepted answers; the first is the reference.
        read: gives the picture, or the frames.
        content: gives the bytes that the picture or clip is identified by.
    """

    id: str
    group: str
    kind: str
    modality: Modality
    media: Mapping[str, Any]
    question: str
    answers: tuple[str, ...]
    read: Callable[[], Media] = field(compare=False, repr=False)
    content: Callable[[], Iterable[bytes]] = field(compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Samples of one source, in their order.

    Attributes:
        source: as it was asked for.
        samples: at least one; questions of a group stand together.
        folder: what relative paths are relative to; empty where there are none.
        answer_tokens: tokens of the longest answer, where that is known.
    """

    source: str
    samples: tuple[Sample, ...]
    folder: str = ""
    answer_tokens: int | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that answers depend on."""
        digest = hashlib.sha256()
        seen: set[str] = set()
        for sample in self.samples:
            entry = [sample.id, sample.group, sample.kind, sample.question, *sample.answers]
            digest.update(json.dumps(entry).encode())
            if sample.group not in seen:
                seen.add(sample.group)
                for block in sample.content():
                    digest.update(block)
        return digest.hexdigest()

    @property
    def groups(self) -> tuple[str, ...]:
        """Every group once, in order."""
        return tuple(dict.fromkeys(sample.group for sample in self.samples))

    def first(self, count: int | None) -> Questions:
        """The first ``count`` questions; all where None."""
        if count is None or count >= len(self.samples):
            return self
        source = f"{self.source} (first {count})"
        return replace(self, source=source, samples=self.samples[:count])


def load_questions(source: str, limit: int | None = None) -> Questions:
    """Read the questions of a source; pictures are read when they are needed.

    Args:
        source: see the module.
        limit: the first so many questions; all if omitted.

    Raises:
        EvaluationError: if there is no such source, or it is malformed.
        MissingExtra: if it needs a package that is not installed.
    """
    name, _, rest = source.partition(",")
    options = _options(source, rest)
    if name in _TESTBEDS:
        return _testbed(source, name, options).first(limit)
    if name.startswith(HUB):
        return _data_set(source, name.removeprefix(HUB), options, limit).first(limit)
    _refuse_options(source, options, ())
    path = Path(name)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        known = [*_TESTBEDS, f"{HUB}NAME", f"a folder with {FILE}"]
        raise EvaluationError(f"data {name!r}: no such file or source. {did_you_mean(name, known)}")
    return _json_lines(source, file).first(limit)


def open_reference(media: Mapping[str, Any], folder: str | Path = "") -> Media:
    """The picture or clip that a row of results refers to.

    Args:
        media: as in :class:`~.schema.Row`.
        folder: what relative paths are relative to, as in :class:`~.schema.Data`.

    Raises:
        EvaluationError: if it cannot be found again.
        MediaError: if it cannot be read.
    """
    if "path" in media:
        return _read_file(Path(folder) / media["path"])
    if "testbed" in media:
        name = "testbed" if media["testbed"] == "image" else "testbed-video"
        return _rendered(name, media["seed"], media["index"])
    if "dataset" in media:
        rows = _open_data_set(media["dataset"], media["split"])
        return _read_encoded(rows[media["index"]][media["column"]])
    raise EvaluationError(f"a row refers to its picture by {dict(media)}, which nobody knows.")


def _options(source: str, text: str) -> dict[str, str]:
    options = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise EvaluationError(f"data {source!r}: {part!r} is not 'key=value'.")
        options[key] = value
    return options


def _refuse_options(source: str, given: Iterable[str], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise EvaluationError(
                f"data {source!r}: has no option {key!r}. {did_you_mean(key, known)}"
            )


def _whole(source: str, options: Mapping[str, str], key: str, default: int) -> int:
    value = options.get(key, str(default))
    if not value.isdecimal():
        raise EvaluationError(f"data {source!r}: {key} must be a whole number, got {value!r}.")
    return int(value)


# -- rendered scenes and clips ------------------------------------------------------------------


def _scene(seed: int, index: int) -> tuple[np.ndarray, Sequence[Any]]:
    from tokenreduce_integrations.testbed.scenes import SceneGenerator

    generator = SceneGenerator(seed, "test")
    scene = generator.scene(index)
    return scene.image[None], generator.questions(scene)


def _clip(seed: int, index: int) -> tuple[np.ndarray, Sequence[Any]]:
    from tokenreduce_integrations.testbed.clips import ClipGenerator

    generator = ClipGenerator(seed, "test")
    clip = generator.clip(index)
    return clip.frames, generator.questions(clip)


_TESTBEDS: Final[dict[str, tuple[Modality, Callable[[int, int], Any]]]] = {
    "testbed": ("image", _scene),
    "testbed-video": ("video", _clip),
}


def _rendered(name: str, seed: int, index: int) -> Media:
    modality, render = _TESTBEDS[name]
    frames, _ = render(seed, index)
    return Media(modality, tuple(Image.fromarray(frame) for frame in frames))


def _testbed(source: str, name: str, options: Mapping[str, str]) -> Questions:
    _refuse_options(source, options, ("seed", "scenes", "kinds"))
    modality, render = _TESTBEDS[name]
    seed, scenes = (
        _whole(source, options, key, default)
        for key, default in (("seed", _SEED), ("scenes", _SCENES))
    )
    kinds = options["kinds"].split("+") if "kinds" in options else None
    samples = []
    for index in range(scenes):
        frames, questions = render(seed, index)
        for number, question in enumerate(questions):
            if kinds is None or question.type in kinds:
                samples.append(
                    Sample(
                        id=f"{seed}-{index}-{number}",
                        group=f"{seed}-{index}",
                        kind=question.type,
                        modality=modality,
                        media={"testbed": modality, "seed": seed, "index": index},
                        question=question.text,
                        answers=(question.answer,),
                        read=partial(_pictures, modality, frames),
                        content=partial(_pixels, frames),
                    )
                )
    if not samples:
        raise EvaluationError(f"data {source!r}: has no question.")
    return Questions(source=source, samples=tuple(samples), answer_tokens=1)


def _pictures(modality: Modality, frames: np.ndarray) -> Media:
    return Media(modality, tuple(Image.fromarray(frame) for frame in frames))


def _pixels(frames: np.ndarray) -> Iterator[bytes]:
    yield frames.tobytes()


# -- a file of one's own ------------------------------------------------------------------------


def _json_lines(source: str, file: Path) -> Questions:
    samples = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{file}: cannot be read: {error}.") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            samples.append(_of_line(file, number, line))
    return Questions(source=source, samples=_checked(source, samples), folder=str(file.parent))


def _of_line(file: Path, number: int, line: str) -> Sample:
    place = f"{file}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{place}: is not JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise EvaluationError(f"{place}: must be an object, got {type(entry).__name__}.")
    _refuse_options(place, entry, ("image", "video", "question", "answer", "id", "group", "kind"))
    modalities: list[Modality] = [m for m in ("image", "video") if m in entry]
    if len(modalities) != 1 or not isinstance(entry[modalities[0]], str):
        raise EvaluationError(f"{place}: needs exactly one of 'image' and 'video', a path.")
    [modality] = modalities
    path = file.parent / entry[modality]
    if not path.exists():
        raise EvaluationError(f"{place}: {path}: no such file.")
    return _sample(place, entry, modality, {"path": entry[modality]}, path, str(number - 1))


def _sample(
    place: str,
    entry: Mapping[str, Any],
    modality: Modality,
    media: Mapping[str, Any],
    path: Path,
    default_id: str,
) -> Sample:
    return Sample(
        id=str(entry.get("id", default_id)),
        group=str(entry.get("group", entry[modality])),
        kind=str(entry.get("kind", "")),
        modality=modality,
        media=media,
        question=_question(place, entry.get("question")),
        answers=_answers(place, entry.get("answer")),
        read=partial(_read_file, path),
        content=partial(_blocks, path),
    )


def _question(place: str, given: object) -> str:
    if not isinstance(given, str) or not given.strip():
        raise EvaluationError(f"{place}: 'question' must be text, got {given!r}.")
    return given.strip()


def _answers(place: str, given: object) -> tuple[str, ...]:
    answers = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not answers or not all(isinstance(a, str | int | float) for a in answers):
        raise EvaluationError(
            f"{place}: 'answer' must be text or a list of accepted answers, got {given!r}."
        )
    return tuple(dict.fromkeys(str(a) for a in answers))


def _checked(source: str, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """The samples, questions of a group next to one another.

    Raises:
        EvaluationError: if there is none, or an id occurs twice.
    """
    if not samples:
        raise EvaluationError(f"data {source!r}: has no question.")
    ids = [sample.id for sample in samples]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise EvaluationError(f"data {source!r}: the id {twice!r} occurs twice.")
    order = {group: i for i, group in enumerate(dict.fromkeys(s.group for s in samples))}
    return tuple(sorted(samples, key=lambda sample: order[sample.group]))


def _read_file(path: Path) -> Media:
    file = open_video_file(path)
    if file is None:
        return open_media(path)
    frames = list(file.frames(fps=max(1.0, VIDEO_FRAMES / (file.duration or VIDEO_FRAMES))))
    chosen = np.linspace(0, len(frames) - 1, min(VIDEO_FRAMES, len(frames))).round().astype(int)
    return Media("video", tuple(Image.fromarray(frames[i]) for i in chosen))


def _blocks(path: Path) -> Iterator[bytes]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                yield block


# -- Hugging Face data sets ---------------------------------------------------------------------

_COLUMNS: Final = ("image", "question", "answer", "kind", "id")


def _data_set(source: str, name: str, options: Mapping[str, str], limit: int | None) -> Questions:
    _refuse_options(source, options, ("split", *_COLUMNS))
    split = options.get("split", "test")
    rows = _open_data_set(name, split)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    column = {key: options.get(key, key) for key in _COLUMNS}
    for key in ("image", "question", "answer"):
        if column[key] not in rows.column_names:
            raise EvaluationError(
                f"data {source!r}: has no column {column[key]!r}; name it by {key}=COLUMN. Its "
                f"columns: {', '.join(rows.column_names)}."
            )
    # Questions are read without the pictures beside them, which is much faster.
    texts = rows.select_columns([c for c in dict.fromkeys(column.values())
                                 if c in rows.column_names and c != column["image"]])  # fmt: skip
    samples, groups = [], dict[str, str]()
    for index, entry in enumerate(texts):
        place = f"{source}, row {index}"
        read = partial(_picture_of, rows, index, column["image"])
        # Rows of one picture repeat it, so that its bytes tell which they are.
        mark = hashlib.sha256(b"".join(_encoded(rows[index][column["image"]]))).hexdigest()
        samples.append(
            Sample(
                id=str(entry.get(column["id"], index)),
                group=groups.setdefault(mark, str(len(groups))),
                kind=str(entry.get(column["kind"], "")),
                modality="image",
                media={
                    "dataset": name,
                    "split": split,
                    "index": index,
                    "column": column["image"],
                },
                question=_question(place, entry[column["question"]]),
                answers=_answers(place, entry[column["answer"]]),
                read=read,
                content=partial(_mark, mark),
            )
        )
    return Questions(source=source, samples=_checked(source, samples))


def _open_data_set(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(
            "Hugging Face data sets need the package 'datasets'. Run: "
            "pip install 'tokenreduce[datasets]'"
        ) from error
    try:
        stored = Path(name)
        if (stored / "state.json").is_file() or (stored / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            rows = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise EvaluationError(
            f"data set {name!r}, split {split!r}, cannot be opened: {error}"
        ) from error
    undecoded = {
        column: datasets.Image(decode=False)
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.Image)
    }
    for column, feature in undecoded.items():
        rows = rows.cast_column(column, feature)
    return rows


def _picture_of(rows: Any, index: int, column: str) -> Media:
    return _read_encoded(rows[index][column])


def _encoded(value: Mapping[str, Any]) -> Iterator[bytes]:
    if value.get("bytes") is not None:
        yield value["bytes"]
        return
    yield from _blocks(Path(value["path"]))


def _read_encoded(value: Mapping[str, Any]) -> Media:
    try:
        with Image.open(io.BytesIO(b"".join(_encoded(value)))) as opened:
            return Media("image", (opened.convert("RGB"),))
    except (OSError, ValueError) as error:
        raise MediaError(f"a picture of the data set cannot be read: {error}.") from error


def _mark(mark: str) -> Iterator[bytes]:
    yield mark.encode()
