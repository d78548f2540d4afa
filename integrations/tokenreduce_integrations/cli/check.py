"""``tokenreduce check``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from tokenreduce_integrations.cli.output import Json, console, print_json, table


def check(
    name: Annotated[str, typer.Argument(help="Name of a registered strategy.")],
    as_json: Json = False,
) -> None:
    """Run the conformance checks on an installed strategy; exit code 1 if one fails."""
    from tokenreduce.testing import run_checks

    results = run_checks(name)
    good = sum(result.ok for result in results)
    if as_json:
        print_json(
            [
                {
                    "check": result.check,
                    "meaning": result.meaning,
                    "outcome": result.outcome,
                    "ok": result.ok,
                    "detail": result.detail,
                }
                for result in results
            ]
        )
    else:
        rows = [
            (
                result.check,
                Text(result.outcome, style="green" if result.ok else "bold red"),
                result.detail or result.meaning,
            )
            for result in results
        ]
        out = console()
        out.print(table(("check", "outcome", "what"), rows))
        out.print(f"{name}: {good} of {len(results)} checks are in order.", markup=False)
    if good < len(results):
        raise typer.Exit(1)
