"""``tokenreduce cite``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce.api import strategy_info
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.card import read_card
from tokenreduce_integrations.cli.output import Json, print_json

if TYPE_CHECKING:
    from tokenreduce.reducer import Reducer

_ENTRY = re.compile(r"```bibtex\n(.*?)\n```", re.DOTALL)


def cite(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE|NAME", help="A pipeline file or preset, or the name of a strategy."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Print what to cite, as BibTeX: one entry for each paper that the strategies come from."""
    # What looks like no file is a name; a mistyped one is answered with those that are near.
    named = source not in installed().presets and not Path(source).suffix and "@" not in source
    records = [strategy_info(source)] if named else list(_of_pipeline(source))
    entries = {record.name: bibtex(record) for record in records}
    if as_json:
        print_json(entries)
        return
    typer.echo("\n\n".join(dict.fromkeys(entry for entry in entries.values() if entry)))
    for name, entry in entries.items():
        if not entry:
            typer.echo(f"% {name}: nothing to cite.", err=True)


def bibtex(record: StrategyRecord) -> str:
    """The entry on a strategy's card; empty if there is none."""
    found = _ENTRY.search(read_card(record.target).documentation)
    return found[1] if found else ""


def _of_pipeline(source: str) -> Iterator[StrategyRecord]:
    """The records of a pipeline's strategies, wrappers before what they wrap."""
    from tokenreduce.config import load_pipeline

    def walk(reducers: Iterable[Reducer]) -> Iterator[StrategyRecord]:
        for reducer in reducers:
            yield reducer.record
            yield from walk(reducer.inner_reducers())

    return walk(stage.reducer for stage in load_pipeline(source).stages)
