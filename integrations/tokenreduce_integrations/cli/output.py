"""What the commands print, and how."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenreduce.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

_WIDTH_OF_A_FILE = 160


def console() -> Console:
    """The console for standard output; wide where no terminal says how wide it is."""
    measured = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if measured else _WIDTH_OF_A_FILE, highlight=False)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


@contextmanager
def progress_bar(what: str, *, total: float | None) -> Iterator[Callable[[float], None]]:
    """A bar on standard error, where that is a terminal; call what it gives with what is done."""
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "") -> Table:
    """A table of plain text: nothing in a cell is taken for markup.

    Args:
        columns: headings; one that begins with ``>`` is aligned to the right. The first column is
            never cut.
        rows: cells; a :class:`rich.text.Text` keeps its style.
        title: printed above.
    """
    made = Table(title=title or None, title_justify="left", header_style="bold")
    for index, heading in enumerate(columns):
        right = heading.startswith(">")
        made.add_column(
            heading.removeprefix(">"), justify="right" if right else "left", no_wrap=index == 0
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture.

    Raises:
        MediaError: if it cannot be written there.
    """
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise MediaError(
            f"{path}: the picture cannot be written: {error}. Give a .png path in a folder that "
            "exists and may be written to."
        ) from error
