"""The commands put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokenreduce import __version__
from tokenreduce.errors import TokenReduceError
from tokenreduce_integrations.cli import (
    bench,
    check,
    choose,
    cite,
    compare,
    demo,
    evaluate,
    info,
    listing,
    new,
    plugins,
    run,
    serve,
    show,
)


class _Group(TyperGroup):
    """Prints the errors that TokenReduce raises on purpose as one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TokenReduceError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fewer visual tokens for multimodal LLMs, without training.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tokenreduce {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and leave.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of every command."""


app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("serve")(serve.serve)
app.command("show")(show.show)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("choose")(choose.choose)
app.command("list")(listing.list_)
app.command("info")(info.info)
app.command("check")(check.check)
app.command("cite")(cite.cite)
app.command("plugins")(plugins.plugins)
app.command("new")(new.new)
