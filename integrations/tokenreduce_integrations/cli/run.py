"""``tokenreduce run``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenreduce.errors import MediaError
from tokenreduce_integrations.cli.output import Json, console, print_json, progress_bar

if TYPE_CHECKING:
    from tokenreduce.pipeline import Pipeline
    from tokenreduce.receipt import Receipt
    from tokenreduce_integrations.transformers.resolution import Shrunk
    from tokenreduce_integrations.video.decoding import VideoFile

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Values to replace, as in reduce.0.reduction=8 or model.dtype=float32.",
        show_default=False,
    ),
]


def run(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, or the name of a preset.")],
    media: Annotated[
        Path, typer.Argument(help="A picture, a video file, or a folder with a clip's frames.")
    ],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    overrides: Overrides = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    no_reduction: Annotated[
        bool, typer.Option("--no-reduction", help="Keep all tokens, for comparison.")
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Frames a second of a clip; if omitted, of a video file the model's own.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask a question about a picture or clip, and print the answer and the receipt."""
    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.transformers.resolution import shrunk_picture

    # What can be wrong without the model is found before it is loaded.
    loaded = load_pipeline(pipeline, overrides or ())
    question = chat.require_question(question)
    file = chat.open_video_file(media)
    if file is not None:
        _ask_file(loaded, file, question, max_new_tokens, no_reduction, fps, as_json)
        return
    opened = chat.open_media(media)
    if fps is not None and opened.modality == "image":
        raise MediaError(f"--fps {fps:g}: {media} is a picture, not a clip. Leave --fps out.")
    chat.quiet_loading()
    model, processor, attachment = loaded.build()
    with attachment:
        attachment.enabled = not no_reduction
        inputs = chat.encode(processor, opened, question, model.device, fps=fps)
        text = chat.answer(model, processor, inputs, max_new_tokens=max_new_tokens)
        receipt = attachment.receipt
    shrunk = None
    if opened.modality == "image":
        shrunk = shrunk_picture(opened.frames[0].size, processor, inputs)
    _print(text, receipt, reduced=not no_reduction, as_json=as_json, shrunk=shrunk)


def _ask_file(
    loaded: Pipeline,
    file: VideoFile,
    question: str,
    max_new_tokens: int,
    no_reduction: bool,
    fps: float | None,
    as_json: bool,
) -> None:
    """Decode, encode and reduce a clip a few frames at a time, and ask."""
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.video import answering
    from tokenreduce_integrations.video.forms import form_of

    stage = answering.the_stage(loaded.stages)
    chat.quiet_loading()
    model, processor, attachment = loaded.build()
    attachment.detach()
    form_of(model, processor)
    with progress_bar("reading the clip", total=file.duration) as progress:
        reducer = None if no_reduction else stage.reducer
        clip = answering.encode_clip(model, processor, file, reducer, fps=fps, progress=progress)
    text, lengths = answering.answer(
        model, processor, clip, question, max_new_tokens=max_new_tokens
    )
    receipt = answering.receipt(model, clip, stage, lengths, reduced=not no_reduction)
    _print(text, receipt, reduced=not no_reduction, as_json=as_json)


def _print(
    text: str, receipt: Receipt, *, reduced: bool, as_json: bool, shrunk: Shrunk | None = None
) -> None:
    if as_json:
        document = {"answer": text, "reduced": reduced, "receipt": receipt.as_dict()}
        if shrunk is not None:
            document["shrunk"] = shrunk._asdict()
        print_json(document)
        return
    out = console()
    out.print(text, markup=False, soft_wrap=True)
    out.print()
    out.print(str(receipt), style="dim", markup=False, soft_wrap=True)
    if shrunk is not None:
        out.print(f"note: {shrunk}", style="dim", markup=False, soft_wrap=True)
