"""Accuracy against what it costs, as a drawing inside a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Final

from tokenreduce_integrations.evaluation.comparing import COSTS
from tokenreduce_integrations.evaluation.schema import Comparison, Run

WIDTH, HEIGHT = 460, 320
_LEFT, _TOP, _RIGHT, _BOTTOM = 48, 12, 14, 44
#: With more runs than these, only those of the front are named.
_NAMED = 8

#: The label of each axis, and what one unit of it is.
AXES: Final[Mapping[str, tuple[str, float]]] = {
    "tokens": ("visual tokens, mean over LLM layers", 1),
    "flops": ("GFLOPs to the first token", 1e9),
    "time": ("ms to the first token", 1),
}


def pareto_svg(comparison: Comparison, name: str) -> str:
    """One drawing; an empty string where no run has that cost.

    Args:
        comparison: what was measured.
        name: one of :data:`AXES`.
    """
    label, unit = AXES[name]
    costs = {run.name: COSTS[name](run) for run in comparison.runs}
    # On a logarithmic axis, nothing stands at zero.
    points = {key: max(cost / unit, 1e-3) for key, cost in costs.items() if cost is not None}
    runs = [run for run in comparison.runs if run.name in points]
    if not runs:
        return ""
    x = _scale(points.values(), _LEFT, WIDTH - _RIGHT)
    low = math.floor(10 * min(run.accuracy.low for run in runs)) / 10
    high = math.ceil(10 * max(run.accuracy.high for run in runs)) / 10

    def y(accuracy: float) -> float:
        share = (accuracy - low) / max(high - low, 0.1)
        return HEIGHT - _BOTTOM - share * (HEIGHT - _BOTTOM - _TOP)

    front = [key for key in comparison.pareto.get(name, ()) if key in points]
    places = {run.name: (x(points[run.name]), y(run.accuracy.value)) for run in runs}
    parts = [*_y_axis(low, high, y), *_x_axis(points.values(), x, label)]
    if len(front) > 1:
        line = " ".join(f"{places[key][0]:.1f},{places[key][1]:.1f}" for key in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    for run in runs:
        at, height = places[run.name]
        parts.append(
            f'<g class="{escape(run.role)}" data-run="{escape(run.name)}"><title>'
            f"{escape(run.name)}: {100 * run.accuracy.value:.1f} % at {points[run.name]:.4g} "
            f"{escape(label)}</title>"
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(run.accuracy.low):.1f}" '
            f'y2="{y(run.accuracy.high):.1f}" stroke-width="1"/>'
            f"{marker(run.role, at, height)}</g>"
        )
    parts += _names(runs, front, places)
    title = f"Accuracy against {label}. The front: {', '.join(front) or 'none'}."
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def marker(role: str, x: float, y: float) -> str:
    """The mark of a run: roles differ in shape, not in colour alone."""
    if role == "unreduced":
        return f'<path d="M{x:.1f} {y - 6:.1f}l5.5 10h-11z"/>'
    if role == "control":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" stroke-width="1.5"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'


def _scale(values: Iterable[float], start: float, end: float) -> Callable[[float], float]:
    """A logarithmic scale with some room at both ends."""
    logs = [math.log10(value) for value in values]
    room = 0.06 * (max(logs) - min(logs)) or 0.1
    low, high = min(logs) - room, max(logs) + room
    return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def _y_axis(low: float, high: float, y: Callable[[float], float]) -> list[str]:
    parts = []
    for step in range(round(10 * low), round(10 * high) + 1):
        at = y(step / 10)
        parts.append(
            f'<line class="tick" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{10 * step}</text>'
        )
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        "accuracy, %</text>"
    )
    return parts


def _x_axis(values: Iterable[float], x: Callable[[float], float], label: str) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>'
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(label)}</text>"
    ]
    taken = -math.inf
    for value in sorted(set(values)):
        at = x(value)
        if at - taken > 44:
            taken = at
            parts.append(
                f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 5}"/>'
                f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{value:.3g}</text>'
            )
    return parts


def _names(
    runs: Sequence[Run], front: Sequence[str], places: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Names beside their marks, where they cover neither a mark nor another name."""
    named = front if len(runs) > _NAMED else [run.name for run in runs]
    parts: list[str] = []
    taken = [(at - 5, at + 5, height + 4) for at, height in places.values()]
    for name in sorted(named, key=lambda key: places[key][0]):
        at, height = places[name]
        width = 6.4 * len(name)
        left = at + 8 if at + 8 + width < WIDTH else at - 8 - width
        for top in (height + 14, height - 8, height + 28, height - 22):
            clash = any(
                abs(top - other) < 13 and left < end and start < left + width
                for start, end, other in taken
            )
            if not clash and _TOP < top < HEIGHT - _BOTTOM:
                taken.append((left, left + width, top))
                parts.append(f'<text x="{left:.1f}" y="{top:.1f}">{escape(name)}</text>')
                break
    return parts
