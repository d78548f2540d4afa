"""``tokenreduce check``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml  # type: ignore[import-untyped]
from rich.text import Text

from tokenreduce.api import create_strategy, strategy_info
from tokenreduce.errors import PipelineError
from tokenreduce_integrations.cli.output import Json, console, print_json, table

if TYPE_CHECKING:
    from tokenreduce.testing import StrategyLike


def check(
    name: Annotated[str, typer.Argument(help="Name of a registered strategy.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Its options, as in weights=router.safetensors; values are YAML.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance checks on an installed strategy; exit code 1 if one fails."""
    from tokenreduce.testing import run_checks

    results = run_checks(_subject(name, options or ()))
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


def _subject(name: str, options: Sequence[str]) -> StrategyLike:
    """The strategy by its name, or with options.

    Raises:
        UnknownName: if nothing registered the name.
        PipelineError: if an option is malformed, or the one that names weights is missing.
    """
    record = strategy_info(name)
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise PipelineError(f"option {option!r}: is not 'key=value', as in 'layers=4'.")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise PipelineError(f"option {option!r}: is not valid YAML.") from error
    if record.needs_weights and not given:
        raise PipelineError(
            f"{name} runs only with trained weights from a file of yours, so there is nothing to "
            f"check without it. Name the file: tokenreduce check {name} weights=FILE.safetensors"
        )
    return partial(create_strategy, name, **given) if given else name
