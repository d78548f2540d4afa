"""``tokenreduce info``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from tokenreduce.api import strategy_info
from tokenreduce.capabilities import COST_MEANING
from tokenreduce_integrations.cli.card import read_card
from tokenreduce_integrations.cli.listing import PARITY_MARK
from tokenreduce_integrations.cli.output import Json, console, print_json, table

_COUNT_MEANING = {
    "exact": "follows from the budget alone",
    "layout": "follows from the budget and from frames, height and width",
    "adaptive": "depends on the data",
}
_YES = {True: "yes", False: "no"}


def written(options: Mapping[str, Any]) -> str:
    """The options of a preset as they stand in a pipeline."""
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in options.items())


def info(
    name: Annotated[str, typer.Argument(help="Name of a registered strategy.")],
    as_json: Json = False,
) -> None:
    """Show what a strategy does, what it needs, and its options."""
    record = strategy_info(name)
    card = read_card(record.target)
    if as_json:
        options = [asdict(option) for option in card.options]
        document = {"documentation": card.documentation, "options": options}
        print_json(asdict(record) | document)
        return
    out = console()
    out.print(f"{record.name}: {record.summary}", style="bold", markup=False)
    if card.documentation:
        out.print()
        out.print(card.documentation, markup=False, soft_wrap=True)
    facts = [
        ("sites", ", ".join(record.sites)),
        ("kind", record.kind),
        ("kept count", f"{record.count}: {_COUNT_MEANING[record.count]}"),
        ("cost", f"{record.cost}: {COST_MEANING[record.cost]}"),
        ("needs", ", ".join(record.needs) or "projected features only"),
        ("reads if carried", ", ".join(record.uses)),
        ("reads features", "as what it wraps" if record.wraps else _YES[record.reads_features]),
        ("needs weights", "yes, from a file of yours" if record.needs_weights else ""),
        ("needs a grid", _YES[record.needs_grid]),
        ("wraps others", _YES[record.wraps]),
        ("checked against", PARITY_MARK[record.parity]),
        ("paper", f"arXiv:{record.paper}" if record.paper else ""),
        ("extra", f"tokenreduce[{record.extra}]" if record.extra else ""),
        ("from", record.distribution),
        ("class", record.target),
    ]
    out.print()
    out.print(table(("property", "value"), [fact for fact in facts if fact[1]]))
    if record.presets:
        presets = [(name, written(options)) for name, options in record.presets.items()]
        out.print()
        out.print(table(("preset", "options"), presets))
    rows = [(option.name, option.type, option.default, option.help) for option in card.options]
    out.print()
    out.print(table(("option", "type", "default", "meaning"), rows))
