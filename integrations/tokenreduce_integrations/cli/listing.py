"""``tokenreduce list``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, cast

import typer

from tokenreduce.api import list_strategies
from tokenreduce.capabilities import SITES, Site
from tokenreduce.errors import did_you_mean
from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.output import Json, console, print_json, table

PARITY_MARK = {
    "official": "official code",
    "description": "description",
    "none": "no official code",
}


#: Below this many columns a table shows names and summaries only.
WIDE = 110


def list_(
    pattern: Annotated[str, typer.Argument(help="Shell-style pattern of names.")] = "*",
    site: Annotated[
        str | None, typer.Option(help=f"Only those that run there: {', '.join(SITES)}.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the installed strategies.

    Sites: where a strategy can run. Count: whether the kept number of tokens follows from the
    budget alone (exact), from the layout too, or from the data (adaptive). Checked against:
    what its results were compared with.
    """
    strategies = installed().strategies
    records = [strategies[name] for name in list_strategies(pattern, site=cast("Site", site))]
    if as_json:
        print_json([asdict(record) for record in records])
        return
    if not records:
        typer.echo(_nothing(pattern, site), err=True)
        raise typer.Exit(1)
    out = console()
    rows: list[tuple[str, ...]] = [
        (
            record.name,
            ", ".join(record.sites),
            record.kind,
            record.count,
            record.cost,
            PARITY_MARK[record.parity],
            record.summary,
            record.distribution,
        )
        for record in records
    ]
    columns: tuple[str, ...] = (
        "name",
        "sites",
        "kind",
        "count",
        "cost",
        "checked against",
        "summary",
        "from",
    )
    if out.width < WIDE:
        rows = [(row[0], row[6]) for row in rows]
        columns = ("name", "summary")
    out.print(table(columns, rows))
    failed = [status.name for status in installed().statuses if status.state == "failed"]
    if failed:
        names = ", ".join(failed)
        typer.echo(f"Plugins that failed to load: {names}. See 'tokenreduce plugins'.", err=True)


def _nothing(pattern: str, site: str | None) -> str:
    """That no strategy was found, and what to do."""
    where = "" if site is None else f" that runs at the site {site!r}"
    near = did_you_mean(pattern.replace("*", ""), list_strategies(site=cast("Site", site)))
    return f"No installed strategy{where} has a name like {pattern!r}. {near}"
