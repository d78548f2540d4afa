"""``tokenreduce compare``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce_integrations.cli.evaluate import (
    BatchSize,
    Limit,
    MaxNewTokens,
    NumberOfProcesses,
    Scoring,
)
from tokenreduce_integrations.cli.output import Json, console, print_json, progress_bar, table

if TYPE_CHECKING:
    from tokenreduce_integrations.evaluation.schema import Comparison, Estimate, Run, Versus


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PIPELINE|SWEEP|KEY=VALUE",
            help="Pipeline files or presets, or a file with a 'sweep'; and values to replace in "
            "each, as in model.dtype=float32.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="What to ask, as for eval; the sweep's own, or testbed, if omitted."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write, or to continue.")] = Path(
        "tokenreduce-compare"
    ),
    limit: Limit = None,
    batch_size: BatchSize = 64,
    max_new_tokens: MaxNewTokens = None,
    scoring: Scoring = "exact",
    processes: NumberOfProcesses = 1,
    cost_rounds: Annotated[
        int, typer.Option(min=0, help="Interleaved measurements of cost; 0 for none.")
    ] = 5,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a report with right and wrong answers: one page, no requests."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold pipelines against each other, the unreduced model and the controls, on equal questions.

    Accuracies have bootstrap intervals, differences paired tests corrected for their number. A
    killed comparison continues.
    """
    from tokenreduce.errors import MissingExtra
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.evaluation import comparing, plotting
    from tokenreduce_integrations.evaluation.data import load_questions
    from tokenreduce_integrations.evaluation.evaluating import Processes
    from tokenreduce_integrations.evaluation.launching import launch
    from tokenreduce_integrations.evaluation.planning import load_plan

    launch(processes, sys.argv[1:])
    overrides = [source for source in sources if "=" in source and not Path(source).exists()]
    plan = load_plan([source for source in sources if source not in overrides], overrides)
    questions = load_questions(data or plan.data or "testbed", limit)
    options = comparing.Options(
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        scoring=scoring,
        cost_rounds=cost_rounds,
    )
    team = Processes(cpu=all(e.model.torch_device.type == "cpu" for e in plan.entries))
    chat.quiet_loading()
    with progress_bar("comparing", total=1.0) as progress:
        found = comparing.compare(plan, questions, out, options, processes=team, progress=progress)
    if not team.is_main:
        return
    try:
        plotting.draw_pareto(found, out / plotting.PARETO_FILE)
    except MissingExtra as error:
        typer.echo(f"no plot: {error}", err=True)
    if html is not None:
        _report(out, html)
    if as_json:
        print_json(found.as_dict())
        return
    _print(found, out)


def _report(folder: Path, path: Path) -> None:
    from tokenreduce_integrations.evaluation.examples import find_examples
    from tokenreduce_integrations.evaluation.report import write_report
    from tokenreduce_integrations.evaluation.schema import read_comparison

    comparison = read_comparison(folder)
    with progress_bar("drawing answers", total=1.0) as progress:
        examples = find_examples(comparison, progress=progress)
    write_report(comparison, path, examples)


def _print(found: Comparison, out: Path) -> None:
    others = dict.fromkeys(_label(versus, found) for run in found.runs for versus in run.versus)
    columns = ("run", ">accuracy, %", ">tokens", ">first token, ms", *(f">- {o}" for o in others))
    rows = []
    for run in found.runs:
        versus = {_label(one, found): one for one in run.versus}
        rows.append(
            (
                run.name,
                _percent(run.accuracy),
                f"{run.tokens.layer_average:.1f}",
                f"{run.cost.times_ms['first_token']:.1f}" if run.cost else "",
                *(_points(versus.get(other)) for other in others),
            )
        )
    console().print(table(columns, rows))
    if found.refused:
        refused = [(one.name, one.reason) for one in found.refused]
        console().print(table(("cannot run", "because"), refused))
    typer.echo(
        f"{out}: {found.data.samples:,} questions about {found.data.groups:,} pictures. "
        f"Differences in points, with {100 * found.method.confidence:.0f} % paired intervals; "
        "* where p < 0.05, corrected for all comparisons."
    )


def _label(versus: Versus, found: Comparison) -> str:
    other: Run = found.run(versus.other)
    return other.strategy or other.role


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _points(versus: Versus | None) -> str:
    if versus is None:
        return ""
    d = versus.difference
    mark = "*" if versus.p_holm < 0.05 else ""
    return f"{100 * d.value:+.1f}{mark} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
