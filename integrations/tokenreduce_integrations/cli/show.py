"""``tokenreduce show``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce.api import create_strategy
from tokenreduce.errors import BudgetError, MediaError, PipelineError
from tokenreduce.plugins import installed
from tokenreduce_integrations.cli.output import Json, print_json, save_picture
from tokenreduce_integrations.cli.run import Overrides

if TYPE_CHECKING:
    from PIL import Image

    from tokenreduce.attachment import Attachment, ItemReduction
    from tokenreduce_integrations.cli.chat import Media
    from tokenreduce_integrations.seen import Panel

_QUESTION = "What is in this picture?"
_REDUCTION = 16.0
#: Layers of the LLM that see all tokens first, where nothing says how many: as FastV has it.
_LAYER = 2
#: Frames a second of a clip, where nothing says how many.
_FPS = 2.0
_MOST_FRAMES = 256
#: Budgets under which it is seen how long a token lasts, for strategies that score none.
_LADDER = (1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def show(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|PIPELINE",
            help="A pipeline file or preset; or a model (folder, hub name, testbed:b), which is "
            "then reduced with --strategy.",
        ),
    ],
    media: Annotated[
        Path,
        typer.Argument(
            metavar="PICTURE|CLIP",
            help="A picture, a video file, an animation, or a folder with a clip's frames.",
        ),
    ],
    overrides: Overrides = None,
    strategy: Annotated[str, typer.Option(help="For a model: the strategy to show.")] = "lftr",
    reduction: Annotated[
        float | None,
        typer.Option(
            help="For a model: how many times fewer tokens.", show_default=str(_REDUCTION)
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(
            help="For a model: where the strategy runs; the projector if it can.",
            show_default=False,
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For a model and the decoder site: how many layers see all tokens first.",
            show_default=str(_LAYER),
        ),
    ] = None,
    question: Annotated[
        str, typer.Option(help="The prompt, for strategies that read it.")
    ] = _QUESTION,
    heat: Annotated[
        bool,
        typer.Option("--heat", help="Draw how much each token deserves to stay, as colour."),
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Frames a second, read and written.", show_default=str(_FPS)),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(help="The file to write: a PNG, or for a clip also a .gif, .mp4 or .webm."),
    ] = Path("tokenreduce-overlay.png"),
    as_json: Json = False,
) -> None:
    """Draw which tokens of a picture or clip are kept, merged and dropped.

    Kept tokens are bright; merged ones are tinted by and linked to the output that they flowed
    into; dropped ones are dark. Tiles and frames stand side by side in a PNG; a clip may be
    written as one that moves.
    """
    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.seen import panels
    from tokenreduce_integrations.video.writing import MOVING, write_clip

    # What can be wrong without the model is found before it is loaded.
    described = _pipeline(source, strategy, reduction, site, layer)
    loaded = load_pipeline(described, overrides or ())
    question = chat.require_question(question)
    opened = _open(media, fps or _FPS)
    moves = output.suffix.lower() in MOVING
    if moves and opened.modality == "image":
        raise MediaError(f"{output}: a picture does not move. Give a .png path.")
    chat.quiet_loading()
    model, processor, attachment = loaded.build()
    with attachment:
        inputs = chat.encode(processor, opened, question, model.device)
        chat.answer(model, processor, inputs, max_new_tokens=1)
        receipt, items = attachment.receipt, attachment.reductions
        heats: list[list[float] | None] = [None] * len(items)
        meaning = ""
        if heat:
            heats, meaning = _heats(attachment, model, inputs)
    grids = panels(items, inputs, opened.frames, processor=processor, config=model.config)
    if moves:
        drawn = _drawn(items, grids, heats, side=384, every=True)
        write_clip(output, [picture for picture, _ in drawn], fps=fps or _FPS)
    else:
        save_picture(_sheet(items, grids, heats), output)
    if as_json:
        document = {"output": str(output), "receipt": receipt.as_dict()}
        print_json({**document, "heat": meaning} if heat else document)
        return
    typer.echo(f"{output}: {receipt.tokens_in} -> {receipt.tokens_out} visual tokens")
    if heat:
        typer.echo(f"heat: {meaning}; the framed tokens are kept")


def _pipeline(
    source: str, strategy: str, reduction: float | None, site: str | None, layer: int | None
) -> str | dict[str, Any]:
    """What to load: the pipeline that was named, or the strategy on the model that was named.

    Raises:
        PipelineError: if it can be neither, or the site does not suit the strategy.
        UnknownName: if there is no such strategy.
    """
    try:
        exists = Path(source).exists()
        is_file = source.endswith((".yaml", ".yml")) or Path(source).is_file()
    except (OSError, ValueError) as error:
        raise PipelineError(f"{source[:80]!r}: is neither a file nor a model: {error}.") from error
    known = installed()
    if is_file or source in known.presets:
        return source
    if source in known.strategies and not exists:
        raise PipelineError(
            f"{source!r} is a strategy, and what it keeps depends on the model. Name one: "
            f"tokenreduce show MODEL PICTURE --strategy {source}, where MODEL is a folder, a hub "
            "name, or testbed:b, which comes with the package."
        )
    sites = known.strategies[strategy].sites
    chosen = site or ("projector" if "projector" in sites else sites[0])
    stage: dict[str, Any] = {"strategy": strategy, "site": chosen}
    if reduction is not None or _takes_budget(strategy):
        stage["reduction"] = _REDUCTION if reduction is None else reduction
    if layer is not None or chosen == "decoder":
        stage["layer"] = _LAYER if layer is None else layer
    return {"model": {"path": source}, "reduce": [stage]}


def _takes_budget(strategy: str) -> bool:
    """Whether a strategy can be told how many tokens to keep."""
    try:
        create_strategy(strategy, reduction=_REDUCTION)
    except BudgetError:
        return False
    except PipelineError:
        # What else is wrong is said when the whole pipeline is read.
        return True
    return True


def _open(path: Path, fps: float) -> Media:
    """A picture, or a clip's frames.

    Raises:
        MediaError: if it is neither, or has too many frames to draw.
    """
    from PIL import Image

    from tokenreduce_integrations.cli import chat

    file = chat.open_video_file(path)
    if file is None:
        opened = chat.open_media(path)
    else:
        frames = islice(file.frames(fps), _MOST_FRAMES + 1)
        opened = chat.Media("video", tuple(Image.fromarray(frame) for frame in frames))
    if len(opened.frames) > _MOST_FRAMES:
        raise MediaError(
            f"{path}: more than {_MOST_FRAMES} frames are too many to look at. Give a lower --fps, "
            "or a shorter clip."
        )
    return opened


def _heats(
    attachment: Attachment, model: Any, inputs: dict[str, Any]
) -> tuple[list[list[float] | None], str]:
    """How much each token of each item deserves to stay, and what that was read from.

    Raises:
        PipelineError: if it can be read from nothing.
    """
    import torch

    from tokenreduce_integrations.overlay import heat_of_budgets, heat_of_scores

    scored = [heat_of_scores(item) for item in attachment.reductions]
    if any(heat is not None for heat in scored):
        return scored, "the strategy's scores, by rank"
    if len(attachment.stages) > 1 or attachment.stages[0].schedule is not None:
        raise PipelineError(
            "--heat: these stages score no tokens, and there is more than one budget to vary. "
            "Show one stage with one budget, or leave --heat out."
        )
    runs = []
    for reduction in _LADDER:
        try:
            with torch.no_grad(), attachment.budget(reduction=reduction):
                model(**inputs)
        except BudgetError as error:
            raise PipelineError(
                f"--heat: {attachment.stages[0].reducer.name} scores no tokens and takes no "
                "budget, so there is nothing to draw. Leave --heat out."
            ) from error
        runs.append(attachment.reductions)
    heats: list[list[float] | None] = [heat_of_budgets(items) for items in zip(*runs, strict=True)]
    return heats, (
        f"how far the token lasts when reducing {_LADDER[0]} to {_LADDER[-1]} times; this strategy "
        "scores no tokens"
    )


def _drawn(
    items: Sequence[ItemReduction],
    grids: Sequence[Sequence[Panel]],
    heats: Sequence[Sequence[float] | None],
    *,
    side: int,
    every: bool,
) -> Iterator[tuple[Image.Image, str]]:
    """Each panel drawn, and its label; every picture of a panel, or the first."""
    from tokenreduce_integrations.overlay import draw_panel

    for number, (item, found, heat) in enumerate(zip(items, grids, heats, strict=True), start=1):
        for panel in found:
            label = panel.label or (f"{item.modality} {number}" if len(items) > 1 else "")
            for picture in range(len(panel.pictures) if every else 1):
                yield draw_panel(panel, item, picture=picture, side=side, heat=heat), label


def _sheet(
    items: Sequence[ItemReduction],
    grids: Sequence[Sequence[Panel]],
    heats: Sequence[Sequence[float] | None],
) -> Image.Image:
    """Every panel on one picture; its overlay alone if there is one."""
    from tokenreduce_integrations.overlay import contact_sheet

    count = sum(map(len, grids))
    side, columns = (384, 4) if count <= 4 else (192, 6)
    drawn = list(_drawn(items, grids, heats, side=side, every=False))
    if count == 1 and not drawn[0][1]:
        return drawn[0][0]
    return contact_sheet(
        [picture for picture, _ in drawn], [label for _, label in drawn], columns=columns
    )
