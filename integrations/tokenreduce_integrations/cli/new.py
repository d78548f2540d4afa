"""``tokenreduce new``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce_integrations.scaffold import KINDS, write_project


def new(
    name: Annotated[
        str, typer.Argument(help="Name of the package and of what it registers: my-strategy.")
    ],
    kind: Annotated[
        str, typer.Option(help=f"What the package is to hold: {', '.join(KINDS)}.")
    ] = "strategy",
    folder: Annotated[
        Path, typer.Option(help="Where the package's own folder is made.", show_default=False)
    ] = Path(),
) -> None:
    """Write a plugin package that installs, passes its tests, and waits for your method.

    Nothing is overwritten.
    """
    for path in write_project(name, kind, folder):
        typer.echo(path)
    typer.echo(f"Next: pip install -e '{folder / name}[test]' && python -m pytest {folder / name}")
