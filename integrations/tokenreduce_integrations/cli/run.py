"""``tokenreduce run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenreduce_integrations.cli.output import Json, console, print_json

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to replace, as in reduce.0.reduction=8 or model.dtype=float32.",
        show_default=False,
    ),
]


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, or the name of a preset.")],
    media: Annotated[Path, typer.Argument(help="A picture, or a folder with a clip's frames.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    no_reduction: Annotated[
        bool, typer.Option("--no-reduction", help="Keep all tokens, for comparison.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Ask a question about a picture or clip, and print the answer and the receipt."""
    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.cli import chat

    # What can be wrong without the model is found before it is loaded.
    loaded = load_pipeline(pipeline, overrides or ())
    question = chat.require_question(question)
    opened = chat.open_media(media)
    chat.quiet_loading()
    model, processor, attachment = loaded.build()
    with attachment:
        attachment.enabled = not no_reduction
        inputs = chat.encode(processor, opened, question, model.device)
        text = chat.answer(model, processor, inputs, max_new_tokens=max_new_tokens)
        receipt = attachment.receipt
    if as_json:
        print_json({"answer": text, "reduced": not no_reduction, "receipt": receipt.as_dict()})
        return
    out = console()
    out.print(text, markup=False, soft_wrap=True)
    out.print()
    out.print(str(receipt), style="dim", markup=False, soft_wrap=True)
