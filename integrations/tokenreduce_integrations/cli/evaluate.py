"""``tokenreduce eval``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce_integrations.cli.output import Json, console, print_json, progress_bar, table
from tokenreduce_integrations.cli.run import Overrides

if TYPE_CHECKING:
    from tokenreduce_integrations.evaluation.schema import Row

Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="What to ask: testbed[,seed=..,scenes=..], a JSONL file or a folder with data.jsonl, "
        "or hf:NAME[,split=..]. docs/evaluation.md describes them.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Ask the first so many questions only.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Questions at once; pictures stay whole.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Longest answer in tokens; of the testbed 1.", show_default="32"),
]
Scoring = Annotated[
    str,
    typer.Option(help="exact: the answer and nothing else; contains: the answer, as whole words."),
]

NumberOfProcesses = Annotated[
    int, typer.Option("--processes", min=1, help="Processes that share the questions.")
]


def evaluate(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, a folder, or a preset.")],
    overrides: Overrides = None,
    data: Data = "testbed",
    out: Annotated[Path, typer.Option(help="The JSON lines to write, or to continue.")] = Path(
        "tokenreduce-eval.jsonl"
    ),
    limit: Limit = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = None,
    scoring: Scoring = "exact",
    processes: NumberOfProcesses = 1,
    no_reduction: Annotated[
        bool, typer.Option("--no-reduction", help="Keep all tokens, for comparison.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a pipeline many questions; one row each, with the receipt. A killed run continues.

    On several GPUs, --processes or 'accelerate launch' gives each process one of them.
    """
    from dataclasses import replace

    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.evaluation import evaluating
    from tokenreduce_integrations.evaluation.data import load_questions
    from tokenreduce_integrations.evaluation.launching import launch

    launch(processes, sys.argv[1:])
    loaded = load_pipeline(pipeline, overrides or ())
    questions = load_questions(data, limit)
    longest = max_new_tokens or questions.answer_tokens or evaluating.MAX_NEW_TOKENS
    device = "" if loaded.model is None else loaded.model.torch_device.type
    team = evaluating.Processes(cpu=device == "cpu")
    settings = evaluating.settings_of(
        batch_size=batch_size,
        max_new_tokens=longest,
        scoring=scoring,
        reduced=not no_reduction,
        cached=False,
        device=device,
    )
    header = evaluating.header_of(loaded, questions, settings)
    here = replace(loaded, model=loaded.model and team.on_own_device(loaded.model))
    chat.quiet_loading()
    with (
        evaluating.attached(here, max_new_tokens=longest, reduced=not no_reduction) as answerer,
        progress_bar("asking", total=len(questions.samples) / team.count) as progress,
    ):
        rows = evaluating.evaluate(
            answerer, questions, header, out, processes=team, progress=progress
        )
    if team.is_main:
        _print(rows, out, as_json=as_json)


def _print(rows: Sequence[Row], out: Path, *, as_json: bool) -> None:
    from tokenreduce_integrations.evaluation.summaries import summary_of

    found = summary_of(rows)
    if as_json:
        print_json({"out": str(out), **found.as_dict()})
        return
    console().print(table((str(out), ">"), found.lines()))
