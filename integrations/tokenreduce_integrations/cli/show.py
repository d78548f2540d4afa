"""``tokenreduce show``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tokenreduce.errors import PipelineError
from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.output import Json, print_json, save_picture
from tokenreduce_integrations.cli.run import Overrides

_QUESTION = "What is in this picture?"


def show(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PIPELINE",
            help="A pipeline file or preset; or a model (folder, hub name, testbed:b), which is "
            "then reduced with --strategy.",
        ),
    ],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    overrides: Overrides = None,
    strategy: Annotated[str, typer.Option(help="For a model: the strategy to show.")] = "lftr",
    reduction: Annotated[
        float, typer.Option(help="For a model: how many times fewer tokens.")
    ] = 16.0,
    question: Annotated[
        str, typer.Option(help="The prompt, for strategies that read it.")
    ] = _QUESTION,
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path(
        "tokenreduce-overlay.png"
    ),
    as_json: Json = False,
) -> None:
    """Draw which tokens of a picture are kept, merged and dropped, as a PNG.

    Kept tokens are bright; merged ones are tinted by and linked to the output that they flowed
    into; dropped ones are dark.
    """
    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.overlay import blocks_and_frames, draw_overlay, side_by_side

    loaded = load_pipeline(_pipeline(source, strategy, reduction), overrides or ())
    question = chat.require_question(question)
    picture = chat.open_image(image)
    chat.quiet_loading()
    model, processor, attachment = loaded.build()
    with attachment:
        inputs = chat.encode(processor, chat.Media("image", (picture,)), question, model.device)
        chat.answer(model, processor, inputs, max_new_tokens=1)
        receipt, (item, *_) = attachment.receipt, attachment.reductions
    seen = chat.picture_seen(picture, inputs, processor)
    places = blocks_and_frames(item)
    overlays = [draw_overlay(seen, item, block=block, frame=frame) for block, frame in places]
    labels = [f"block {block}" for block, _ in places]
    sheet = overlays[0] if len(overlays) == 1 else side_by_side(overlays, labels)
    save_picture(sheet, output)
    if as_json:
        print_json({"output": str(output), "receipt": receipt.as_dict()})
        return
    typer.echo(f"{output}: {receipt.tokens_in} -> {receipt.tokens_out} visual tokens")


def _pipeline(source: str, strategy: str, reduction: float) -> str | dict[str, Any]:
    try:
        is_file = source.endswith((".yaml", ".yml")) or Path(source).is_file()
    except (OSError, ValueError) as error:
        raise PipelineError(f"{source[:80]!r}: is neither a file nor a model: {error}.") from error
    if is_file or source in installed().presets:
        return source
    return {"model": {"path": source}, "reduce": [{"strategy": strategy, "reduction": reduction}]}
