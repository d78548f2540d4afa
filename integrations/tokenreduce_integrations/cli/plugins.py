"""``tokenreduce plugins``."""

from __future__ import annotations

from dataclasses import asdict

import typer
from rich.text import Text

from tokenreduce.plugins import PluginStatus, installed
from tokenreduce_integrations.cli.output import Json, console, print_json, table

_STYLE = {"loaded": "green", "failed": "bold red", "skipped": "yellow"}


def plugins(as_json: Json = False) -> None:
    """Show every installed plugin, what it registered, and why one failed.

    With TOKENREDUCE_STRICT=1 the first plugin that fails is an error, and the exit code 1.
    """
    statuses = installed().statuses
    if as_json:
        print_json([asdict(status) for status in statuses])
        return
    rows = [
        (
            status.name,
            status.distribution,
            Text(_state(status), style=_STYLE[status.state]),
            status.error or ", ".join(status.registered),
            f"{1000 * status.seconds:.0f}",
        )
        for status in statuses
    ]
    console().print(table(("plugin", "from", "state", "registered, or what failed", ">ms"), rows))
    for status in statuses:
        if status.slow and not status.distribution.startswith("tokenreduce "):
            typer.echo(
                f"{status.name} ({status.distribution}) takes {status.seconds:.1f} s to import, in "
                "every program that uses TokenReduce: its entry point should name a module that "
                "imports nothing heavy.",
                err=True,
            )


def _state(status: PluginStatus) -> str:
    return f"{status.state} at {status.phase}" if status.phase else status.state
