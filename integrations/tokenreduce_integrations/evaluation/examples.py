"""Right and wrong answers of a comparison, with what was kept of their pictures.

Rows say how many tokens were kept, not which. So the chosen questions are put to the pipelines
again, and what comes out must be what was evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import yaml  # type: ignore[import-untyped]

from tokenreduce.attachment import attach, find_loader
from tokenreduce.config import load_pipeline
from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.evaluation.data import open_reference
from tokenreduce_integrations.evaluation.schema import Comparison, Row, Run
from tokenreduce_integrations.overlay import contact_sheet, draw_panel
from tokenreduce_integrations.seen import panels

if TYPE_CHECKING:
    from PIL import Image

#: Most panels of one overlay: frames of a clip, tiles of several pictures.
_PANELS: Final = 8


@dataclass(frozen=True, kw_only=True)
class Example:
    """An answer, and what was kept of its picture.

    Attributes:
        run: name of the run.
        row: the answer.
        unreduced: whether the unreduced model answered right; None where there is no such run.
        overlay: what became of the visual tokens.
    """

    run: str
    row: Row
    unreduced: bool | None
    overlay: Image.Image


def runs_to_show(comparison: Comparison, most: int) -> list[Run]:
    """The strategies to show: those of the Pareto fronts first, then by accuracy."""
    front = {name for names in comparison.pareto.values() for name in names}
    known = [run for run in comparison.runs if run.role == "strategy"]
    known.sort(key=lambda run: (run.name not in front, -run.accuracy.value))
    return known[:most]


def choose_rows(rows: Sequence[Row], unreduced: Mapping[str, bool], each: int) -> list[Row]:
    """Right answers, then wrong ones; no picture twice among either.

    Wrong answers that the unreduced model had right come first: they are what reducing cost.

    Args:
        rows: of one run.
        unreduced: by id, whether the unreduced model answers right.
        each: most right, and most wrong ones.
    """
    chosen: list[Row] = []
    for correct in (True, False):
        mine = [row for row in rows if row.correct == correct]
        mine.sort(key=lambda row: not unreduced.get(row.id, True))
        groups: dict[str, Row] = {}
        for row in mine:
            groups.setdefault(row.group, row)
        chosen += list(groups.values())[:each]
    return chosen


def find_examples(
    comparison: Comparison,
    *,
    each: int = 2,
    most_runs: int = 6,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Example]:
    """Right and wrong answers of the runs to show, with overlays.

    Args:
        comparison: as it was read from its folder.
        each: most right, and most wrong answers of a run.
        most_runs: most runs.
        progress: called with the share that is done.

    Raises:
        EvaluationError: if a pipeline keeps other numbers of tokens than its rows say.
        TokenReduceError: if a model, or a picture, is not there any more.
    """
    runs = runs_to_show(comparison, most_runs)
    unreduced = {
        run.model: {row.id: row.correct for row in comparison.rows(run)}
        for run in comparison.runs
        if run.role == "unreduced"
    }
    loaded: dict[str, tuple[Any, Any]] = {}
    found = []
    for number, run in enumerate(runs):
        progress(number / len(runs))
        pipeline = load_pipeline(yaml.safe_load(run.pipeline))
        settings = pipeline.model
        if settings is None:
            raise EvaluationError(f"run {run.name!r}: its pipeline names no model.")
        if run.model not in loaded:
            # One model at a time, as many as there is memory for.
            loaded = {run.model: find_loader(settings.adapter)(settings, ())}
        model, processor = loaded[run.model]
        known = unreduced.get(run.model, {})
        rows = choose_rows(list(comparison.rows(run)), known, each)
        joint = settings.joint_encoder
        with attach(model, pipeline, processor=processor, joint_encoder=joint) as attachment:
            for row in rows:
                overlay = _overlay(model, processor, attachment, row, comparison, run)
                found.append(
                    Example(run=run.name, row=row, unreduced=known.get(row.id), overlay=overlay)
                )
    return found


@torch.no_grad()
def _overlay(
    model: Any, processor: Any, attachment: Any, row: Row, comparison: Comparison, run: Run
) -> Image.Image:
    media = open_reference(row.media, comparison.data.folder)
    inputs = chat.encode(processor, media, row.question, model.device)
    model(**inputs)
    counts = [(item.tokens_in, item.tokens_out) for item in attachment.receipt.items]
    recorded = [(item["tokens_in"], item["tokens_out"]) for item in row.receipt["items"]]
    if counts != recorded:
        raise EvaluationError(
            f"run {run.name!r}, sample {row.id!r}: keeps {counts} tokens (in, out) now, but "
            f"{recorded} when it was evaluated. The model, the data or the release changed: "
            "evaluate again."
        )
    items = attachment.reductions
    grids = panels(items, inputs, media.frames, processor=processor, config=model.config)
    drawn = [
        (draw_panel(panel, item, side=192), panel.label)
        for item, mine in zip(items, grids, strict=True)
        for panel in mine
    ]
    if len(drawn) == 1:
        return drawn[0][0]
    step = -(-len(drawn) // _PANELS)
    pictures, labels = zip(*drawn[::step], strict=True)
    return contact_sheet(pictures, labels, columns=2)
