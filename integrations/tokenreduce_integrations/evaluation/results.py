"""The file of an evaluation: append-only, so that a killed run loses nothing and counts nothing
twice.

Rows of a batch are written at once and flushed to the disk. A line that a kill tore apart is cut
off when the evaluation is continued. Several processes write a part each, beside the file; when all
are done, the parts are merged in the order of the data.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.evaluation.schema import Header, Row, header_of, line_of, row_of

_SHOWN = 60


@dataclass(frozen=True)
class _Read:
    """What a file holds.

    Attributes:
        rows: by id.
        size: bytes up to the end of the last whole line.
    """

    rows: dict[str, Row]
    size: int


class Results:
    """Rows of an evaluation that may have been begun before.

    Args:
        path: the file.
        header: of this evaluation.
        ids: of the samples, in the order of the data.
        process: which of several processes this is.
        processes: how many there are.

    Raises:
        EvaluationError: if the file belongs to another evaluation, is malformed, cannot be
            written, or is being written by another process.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        ids: Sequence[str],
        *,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.path = path
        self._header = header
        self._ids = ids
        self._mine = path if processes == 1 else _part(path, process)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(self._mine, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        except OSError as error:
            raise EvaluationError(f"{self._mine}: cannot be written: {error}.") from error
        try:
            _lock(self._file)
            self._continue()
            self.rows = self._all_rows()
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows, so that they survive whatever happens next."""
        self._file.write("".join(map(line_of, rows)).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.update({row.id: row for row in rows})

    def merge(self) -> None:
        """Put all parts into one file in the order of the data.

        Raises:
            EvaluationError: if samples are missing.
        """
        rows, parts = self.finished(), self._parts()
        if not parts:
            return
        whole = self.path.with_name(f"{self.path.name}.whole")
        lines = (line_of(self._header), *map(line_of, rows))
        whole.write_text("".join(lines), encoding="utf-8")
        # At once: whoever is killed here leaves the parts, or the new file.
        whole.replace(self.path)
        for part in parts:
            part.unlink()

    def finished(self) -> list[Row]:
        """Every row, in the order of the data.

        Raises:
            EvaluationError: if samples are missing.
        """
        self.rows = rows = self._all_rows()
        missing = [name for name in self._ids if name not in rows]
        if missing:
            raise EvaluationError(
                f"{self.path}: {len(missing)} of {len(self._ids)} samples are missing, among them "
                f"{missing[0]!r}."
            )
        return [rows[name] for name in self._ids]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part*"))

    def _all_rows(self) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for file in (self.path, *self._parts()):
            if file.exists():
                rows = {**self._read(file).rows, **rows}
        return rows

    def _continue(self) -> None:
        """Cut off what a kill tore, and go to the end."""
        size = self._read(self._mine).size
        self._file.truncate(size)
        self._file.seek(size)
        if size == 0:
            self._file.write(line_of(self._header).encode())
            self._file.flush()

    def _read(self, file: Path) -> _Read:
        """The rows of a file; a line without an end was torn by a kill, and is no row.

        Raises:
            EvaluationError: if it belongs to another evaluation, or is malformed.
        """
        try:
            content = file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            first, *lines = whole.decode().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"{file}: cannot be read: {error}.") from error
        if not first:
            return _Read({}, 0)
        self._require_same(file, header_of(first, str(file)))
        rows = {}
        known = set(self._ids)
        for number, line in enumerate(lines[:-1], start=2):
            row = row_of(line, f"{file}, line {number}")
            if row.id in rows or row.id not in known:
                raise EvaluationError(
                    f"{file}, line {number}: the sample {row.id!r} occurs twice, or is not in the "
                    "data. Delete the file to begin anew."
                )
            rows[row.id] = row
        return _Read(rows, len(whole))

    def _require_same(self, file: Path, found: Header) -> None:
        differing = [
            f"{f.name} ({_short(getattr(found, f.name))} there, "
            f"{_short(getattr(self._header, f.name))} now)"
            for f in fields(Header)
            if getattr(found, f.name) != getattr(self._header, f.name)
        ]
        if differing:
            raise EvaluationError(
                f"{file}: was begun with another {'; '.join(differing)}. Answers of different "
                "evaluations do not go into one file: write elsewhere, or delete it."
            )


def _short(value: object) -> str:
    text = str(value)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _lock(file: IO[bytes]) -> None:
    """Keep other processes from writing the same file; a kill releases it.

    Raises:
        EvaluationError: if one is.
    """
    # Windows has no such locks, and the file is not inherited there.
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise EvaluationError(
            f"{file.name}: another process is writing it. Wait for it, or write elsewhere."
        ) from error


def _part(path: Path, process: int) -> Path:
    return path.with_name(f"{path.name}.part{process}")
