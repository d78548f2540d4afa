"""``tokenreduce choose``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce_integrations.cli.output import Json, console, print_json, table

if TYPE_CHECKING:
    from tokenreduce_integrations.evaluation.choosing import Choice, Evidence


def choose(
    model: Annotated[
        str,
        typer.Option(help="A folder, a config.json, a hub name, or testbed:b; weights stay."),
    ],
    budget: Annotated[
        str, typer.Option(help="keep=64, keep_ratio=0.1 or reduction=8.")
    ] = "reduction=8",
    task: Annotated[
        str | None, typer.Option(help="Order by one type of question, such as count.")
    ] = None,
    modality: Annotated[str, typer.Option(help="Of the evidence: image or video.")] = "image",
    joint_encoder: Annotated[
        str | None,
        typer.Option(help="The vision-text encoder that the model took its tower from."),
    ] = None,
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a picture, where keep=.. is given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Which strategies can run on a model, best first by committed evidence; why others cannot."""
    from tokenreduce_integrations.evaluation import choosing

    found = choosing.choose(
        model,
        _budget(budget),
        task=task,
        modality=modality,
        joint_encoder=joint_encoder,
        tokens=visual_tokens,
    )
    if as_json:
        print_json([{**asdict(choice), "share": choice.share} for choice in found])
        return
    _print(found, task)


def _budget(text: str) -> dict[str, float]:
    """A budget as it is written.

    Raises:
        BudgetError: if it is not a number of something.
    """
    from tokenreduce.errors import BudgetError
    from tokenreduce.reducer import BUDGET_FIELDS

    key, _, value = text.partition("=")
    try:
        number = int(value) if key == "keep" else float(value)
    except ValueError:
        number = None
    if key not in BUDGET_FIELDS or number is None:
        raise BudgetError(f"budget {text!r}: write keep=64, keep_ratio=0.1 or reduction=8.")
    return {key: number}


def _print(found: list[Choice], task: str | None) -> None:
    out = console()
    sources = dict.fromkeys(e.source for choice in found for e in choice.evidence)
    rows = []
    for choice in found:
        if not choice.reason:
            known = {e.source: e for e in choice.evidence}
            cells = [_cell(known.get(source), task) for source in sources]
            rows.append((choice.strategy, choice.site, *cells))
    numbered = [f"evidence {number}" for number, _ in enumerate(sources, start=1)]
    out.print(table(("can run", "site", *numbered), rows))
    refused = [(c.strategy, c.site, c.reason) for c in found if c.reason]
    if refused:
        out.print(table(("cannot run", "site", "because"), refused))
    what = "accuracy" if task is None else f"accuracy on {task!r}"
    for number, source in enumerate(sources, start=1):
        typer.echo(
            f"evidence {number}: {source}: {what} as a share of the unreduced model's, at the "
            "nearest measured reduction."
        )
    if not sources:
        typer.echo("no evidence of this modality is committed: the order is by name.")


def _cell(evidence: Evidence | None, task: str | None) -> str:
    if evidence is None:
        return "-"
    text = f"{100 * evidence.share:.1f} % at {evidence.reduction:g}x"
    if task is None:
        half = (evidence.interval.high - evidence.interval.low) / 2 / evidence.unreduced
        text += f" (± {100 * half:.1f})"
    return text
