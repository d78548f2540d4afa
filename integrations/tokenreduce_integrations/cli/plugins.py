"""``tokenreduce plugins``."""

from __future__ import annotations

from dataclasses import asdict

from rich.text import Text

from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.output import Json, console, print_json, table

_STYLE = {"loaded": "green", "failed": "bold red", "skipped": "yellow"}


def plugins(as_json: Json = False) -> None:
    """Show every installed plugin, what it registered, and why one failed."""
    statuses = installed().statuses
    if as_json:
        print_json([asdict(status) for status in statuses])
        return
    rows = [
        (
            status.name,
            status.distribution,
            Text(status.state, style=_STYLE[status.state]),
            status.error or ", ".join(status.registered),
            f"{1000 * status.seconds:.0f}",
        )
        for status in statuses
    ]
    console().print(table(("plugin", "from", "state", "registered, or what failed", ">ms"), rows))
