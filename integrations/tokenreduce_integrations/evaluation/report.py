"""A comparison as one page that needs nothing else: no request leaves it."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tokenreduce.errors import EvaluationError
from tokenreduce_integrations.evaluation.comparing import COSTS
from tokenreduce_integrations.evaluation.examples import Example
from tokenreduce_integrations.evaluation.pareto_svg import AXES, marker, pareto_svg
from tokenreduce_integrations.evaluation.schema import PARTS, Comparison, Estimate, Run

if TYPE_CHECKING:
    from PIL import Image

_SIGNIFICANT: Final = 0.05
_ROLES: Final = {"strategy": "strategy", "control": "control", "unreduced": "unreduced model"}


@dataclass(frozen=True)
class Column:
    """One column of the table of runs.

    Attributes:
        field: names the column in the markup, beside each cell.
        heading: what a reader sees.
        text: what a cell shows; empty where there is nothing.
        value: what the column is sorted by.
    """

    field: str
    heading: str
    text: Callable[[Run], str]
    value: Callable[[Run], float | str | None]

    @property
    def is_text(self) -> bool:
        """Whether its cells are words."""
        return self.field in ("role", "strategy", "sites", "budget")


def columns(comparison: Comparison) -> list[Column]:
    """The columns of the table of runs: those that some run has something in."""
    found = [
        Column(
            "accuracy",
            "accuracy, %",
            lambda run: _percent(run.accuracy),
            lambda run: run.accuracy.value,
        ),
        Column(
            "share",
            "of unreduced, %",
            lambda run: "" if run.share is None else _percent(run.share),
            lambda run: None if run.share is None else run.share.value,
        ),
        Column(
            "tokens_out",
            "tokens kept",
            lambda run: f"{run.tokens.tokens_out:.1f} of {run.tokens.tokens_in:.1f}",
            lambda run: run.tokens.tokens_out,
        ),
        _number("layer_average", "tokens a layer", lambda run: run.tokens.layer_average, digits=1),
        *(_time(part) for part in (*PARTS, "first_token")),
        _number("flops", "GFLOPs, first token", COSTS["flops"], digits=3, unit=1e9),
        _number(
            "kv_bytes",
            "KV cache, KiB",
            lambda run: run.cost.kv_bytes if run.cost else None,
            digits=1,
            unit=1024,
        ),
        *(_versus(label, comparison) for label in _others(comparison)),
        Column("role", "role", lambda run: _ROLES.get(run.role, run.role), lambda run: run.role),
        Column("strategy", "strategy", lambda run: run.strategy, lambda run: run.strategy),
        Column("sites", "site", lambda run: ", ".join(run.sites), lambda run: ", ".join(run.sites)),
        Column("budget", "budget", lambda run: run.budget, lambda run: run.budget),
    ]
    return [
        column
        for column in found
        if any(column.value(run) not in (None, "") for run in comparison.runs)
    ]


def render_report(comparison: Comparison, examples: Sequence[Example] = ()) -> str:
    """The page.

    Args:
        comparison: what was measured.
        examples: answers with overlays.
    """
    code = {
        name: (resources.files(__package__) / f"report.{name}").read_text(encoding="utf-8")
        for name in ("css", "js")
    }
    data = comparison.data
    title = f"{len(comparison.runs)} pipelines on {data.source}"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += "script-src 'unsafe-inline'"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{data.samples:,} questions about {data.groups:,} '
        f"{'clips' if data.modality == 'video' else 'pictures'}, {escape(comparison.device)}.</p>",
        _runs_section(comparison),
        _plots_section(comparison),
        _kinds_section(comparison),
        _examples_section(examples),
        _refused_section(comparison),
        _method_section(comparison),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n"
        '<link rel="icon" href="data:,">\n'
        f"<style>\n{code['css']}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main>\n<script>\n{code['js']}</script>\n</body>\n</html>\n"
    )


def write_report(comparison: Comparison, path: Path, examples: Sequence[Example] = ()) -> None:
    """Write the page.

    Raises:
        EvaluationError: if it cannot be written there.
    """
    try:
        path.write_text(render_report(comparison, examples), encoding="utf-8")
    except OSError as error:
        raise EvaluationError(f"{path}: the report cannot be written: {error}.") from error


# -- sections ----------------------------------------------------------------------------------


def _runs_section(comparison: Comparison) -> str:
    shown = columns(comparison)
    head = "".join(_heading(column.heading, column.field, words=column.is_text) for column in shown)
    rows = []
    for run in comparison.runs:
        cells = "".join(
            f'<td data-field="{column.field}" data-value="{_sortable(column.value(run))}"'
            f"{' class=text' if column.is_text else ''}>{escape(column.text(run))}</td>"
            for column in shown
        )
        rows.append(
            f'<tr class="{escape(run.role)}" data-run="{escape(run.name)}">'
            f'<th scope="row">{escape(run.name)}</th>{cells}</tr>'
        )
    confidence = f"{100 * comparison.method.confidence:.0f} %"
    legend = (
        f"Accuracy is the mean over question types, with {confidence} intervals. Times are of one "
        "prompt, in ms. Differences are in points, with paired intervals; * marks p &lt; "
        f"{_SIGNIFICANT}, corrected for all comparisons."
    )
    return (
        f'<h2>Pipelines</h2><p id="legend">{legend}</p>'
        '<div class="scroll" role="region" aria-label="Table of pipelines" tabindex="0">'
        f'<table id="runs" aria-describedby="legend"><thead><tr>{_heading("pipeline", "name")}'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _plots_section(comparison: Comparison) -> str:
    drawings = [(name, pareto_svg(comparison, name)) for name in AXES]
    figures = "".join(
        f'<figure data-axis="{name}">{svg}<figcaption>Accuracy against {escape(AXES[name][0])}'
        "</figcaption></figure>"
        for name, svg in drawings
        if svg
    )
    roles = dict.fromkeys(run.role for run in comparison.runs)
    legend = "".join(
        f'<li><svg class="mark" viewBox="0 0 16 16" aria-hidden="true"><g class="{escape(role)}">'
        f"{marker(role, 8, 8)}</g></svg> {escape(_ROLES.get(role, role))}</li>"
        for role in roles
    )
    return (
        "<h2>Accuracy against cost</h2><p>The line joins the runs that no other one beats in "
        "accuracy at equal or lower cost. Bars are intervals.</p>"
        f'<ul class="legend">{legend}</ul><div class="plots">{figures}</div>'
    )


def _kinds_section(comparison: Comparison) -> str:
    kinds = list(dict.fromkeys(kind for run in comparison.runs for kind in run.kinds))
    if len(kinds) < 2:
        return ""
    rows = []
    for run in comparison.runs:
        cells = "".join(
            f'<td data-field="{escape(kind)}">'
            f"{f'{100 * run.kinds[kind].accuracy:.1f}' if kind in run.kinds else ''}</td>"
            for kind in kinds
        )
        rows.append(
            f'<tr class="{escape(run.role)}" data-run="{escape(run.name)}">'
            f'<th scope="row">{escape(run.name)}</th>{cells}</tr>'
        )
    head = "".join(_heading(kind or "all", kind) for kind in kinds)
    return (
        "<h2>Accuracy by type of question, %</h2>"
        '<div class="scroll" role="region" aria-label="Accuracy by type of question" tabindex="0">'
        f'<table id="kinds"><thead><tr>{_heading("pipeline", "name")}{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _examples_section(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    parts = [
        "<h2>Right and wrong answers</h2><p>Kept tokens are bright. Merged ones are tinted in the "
        "colour of the token that they flowed into, which is framed, and linked to it. Dropped "
        "ones are dark.</p>"
    ]
    for name in dict.fromkeys(example.run for example in examples):
        figures = "".join(_figure(example) for example in examples if example.run == name)
        parts.append(f'<h3>{escape(name)}</h3><div class="examples">{figures}</div>')
    return "".join(parts)


def _figure(example: Example) -> str:
    row = example.row
    tokens_in, tokens_out = row.receipt["tokens_in"], row.receipt["tokens_out"]
    verdict = "right" if row.correct else "wrong"
    alt = f"{tokens_out} of {tokens_in} visual tokens kept of the picture of: {row.question}"
    expected = "" if row.correct else f", should be {escape(row.answer)}"
    before = ""
    if example.unreduced is not None:
        before = f" Unreduced: {'right' if example.unreduced else 'wrong'}."
    return (
        f'<figure data-run="{escape(example.run)}" data-sample="{escape(row.id)}">'
        f'<img src="{_data_uri(example.overlay)}" alt="{escape(alt)}" '
        f'width="{example.overlay.width}" height="{example.overlay.height}">'
        f"<figcaption>{escape(row.question)} "
        f'<span class="{verdict}">{escape(row.prediction)}: {verdict}</span>{expected}. '
        f'<span class="faint">{tokens_in} to {tokens_out} tokens.{before}</span>'
        "</figcaption></figure>"
    )


def _refused_section(comparison: Comparison) -> str:
    if not comparison.refused:
        return ""
    rows = "".join(
        f'<tr data-refused="{escape(one.name)}"><th scope="row">{escape(one.name)}</th>'
        f'<td class="reason">{escape(one.reason)}</td></tr>'
        for one in comparison.refused
    )
    return (
        f"<h2>What cannot run here</h2><details><summary>{len(comparison.refused)} "
        "pipelines</summary>"
        '<div class="scroll" role="region" aria-label="What cannot run" tabindex="0">'
        '<table><thead><tr><th scope="col">pipeline</th><th scope="col" class="text">because'
        f"</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def _method_section(comparison: Comparison) -> str:
    method = comparison.method
    tests = (
        "McNemar's test of the questions, each of which has its own picture"
        if method.independent
        else f"a sign-flip test of whole pictures ({method.flips:,} permutations)"
    )
    cost = (
        f" Times are medians of {method.cost_rounds} interleaved rounds."
        if method.cost_rounds
        else ""
    )
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    pipelines = "".join(
        f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.pipeline)}</pre></details>"
        for run in comparison.runs
    )
    return (
        "<h2>How it was measured</h2>"
        f"<p>Intervals are percentiles of {method.resamples:,} bootstrap resamples of whole "
        f"pictures (seed {method.seed}). Differences are paired; p-values are those of {tests}, "
        f"corrected by {escape(method.correction.capitalize())}.{cost}</p>"
        f'<p class="faint">{escape(versions)}. Data <code>{escape(comparison.data.digest[:16])}'
        f"</code>.</p>{pipelines}"
    )


# -- cells -------------------------------------------------------------------------------------


def _heading(text: str, field: str, *, words: bool = False) -> str:
    look = ' class="text"' if words else ""
    return (
        f'<th scope="col" data-field="{escape(field)}"{look}><button type="button">{escape(text)}'
        "</button></th>"
    )


def _number(
    field: str,
    heading: str,
    value: Callable[[Run], float | None],
    *,
    digits: int,
    unit: float = 1.0,
) -> Column:
    """A column of figures, some of which may not have been measured."""

    def text(run: Run) -> str:
        found = value(run)
        return "" if found is None else f"{found / unit:.{digits}f}"

    return Column(field, heading, text, value)


def _time(part: str) -> Column:
    def value(run: Run) -> float | None:
        return run.cost.times_ms.get(part) if run.cost else None

    return _number(part, f"{part.replace('_', ' ')}, ms", value, digits=2)


def _others(comparison: Comparison) -> Iterable[str]:
    """What runs were held against: the unreduced model, and controls by their strategy."""
    return dict.fromkeys(
        _label(comparison.run(one.other)) for run in comparison.runs for one in run.versus
    )


def _versus(label: str, comparison: Comparison) -> Column:
    def text(run: Run) -> str:
        for one in run.versus:
            if _label(comparison.run(one.other)) == label:
                low, high = 100 * one.difference.low, 100 * one.difference.high
                mark = "*" if one.p_holm < _SIGNIFICANT else ""
                return f"{100 * one.difference.value:+.1f}{mark} [{low:+.1f}, {high:+.1f}]"
        return ""

    def value(run: Run) -> float | None:
        for one in run.versus:
            if _label(comparison.run(one.other)) == label:
                return one.difference.value
        return None

    return Column(f"versus-{label}", f"minus {label}", text, value)


def _label(run: Run) -> str:
    return run.strategy or run.role


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _sortable(value: float | str | None) -> str:
    return "" if value is None else escape(str(value))


def _data_uri(picture: Image.Image) -> str:
    held = io.BytesIO()
    picture.save(held, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode()
