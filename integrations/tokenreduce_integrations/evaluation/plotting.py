"""Accuracy against what it costs, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenreduce.errors import MissingExtra
from tokenreduce_integrations.evaluation.comparing import COSTS
from tokenreduce_integrations.evaluation.schema import Comparison, Run

PARETO_FILE: Final = "pareto.png"

_LABELS: Final = {
    "tokens": "visual tokens, mean over LLM layers",
    "flops": "GFLOPs to the first token",
    "time": "ms to the first token",
}
_UNITS: Final = {"flops": 1e9}
_LOOKS: Final = {
    "unreduced": ("black", "*"),
    "control": ("#7f7f7f", "x"),
    "strategy": ("#1f77b4", "o"),
}
#: With more than these, only runs of the front are named.
_NAMED: Final = 12


def draw_pareto(comparison: Comparison, path: Path) -> None:
    """Draw accuracy against tokens, FLOPs and time, with intervals and the Pareto fronts.

    Raises:
        MissingExtra: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra(
            "plots need the package 'matplotlib'. Run: pip install 'tokenreduce[plot]'"
        ) from error
    known = [name for name in COSTS if any(COSTS[name](run) for run in comparison.runs)]
    figure = Figure(figsize=(6 * len(known), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for column, name in enumerate(known):
        _draw_panel(figure.add_subplot(1, len(known), column + 1), comparison, name)
    figure.savefig(path, dpi=120)


def _draw_panel(axes: Any, comparison: Comparison, name: str) -> None:
    front = set(comparison.pareto.get(name, ()))
    for role, (color, marker) in _LOOKS.items():
        runs = [r for r in comparison.runs if r.role == role and _cost(r, name) is not None]
        if runs:
            axes.errorbar(
                [_cost(run, name) for run in runs],
                [100 * run.accuracy.value for run in runs],
                yerr=[
                    [100 * (run.accuracy.value - run.accuracy.low) for run in runs],
                    [100 * (run.accuracy.high - run.accuracy.value) for run in runs],
                ],
                fmt=marker,
                color=color,
                elinewidth=0.6,
                markersize=5,
                label=role,
            )
    best = [comparison.run(run) for run in comparison.pareto.get(name, ())]
    axes.plot(
        [_cost(run, name) for run in best],
        [100 * run.accuracy.value for run in best],
        color="#d62728",
        linewidth=0.8,
        label="Pareto front",
    )
    for run in comparison.runs:
        cost = _cost(run, name)
        if cost is not None and (run.name in front or len(comparison.runs) <= _NAMED):
            axes.annotate(
                run.name,
                (cost, 100 * run.accuracy.value),
                fontsize=6,
                xytext=(3, -7),
                textcoords="offset points",
            )
    axes.set_xscale("log")
    axes.set_xlabel(_LABELS[name])
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="lower right")


def _cost(run: Run, name: str) -> float | None:
    cost = COSTS[name](run)
    return None if cost is None else cost / _UNITS.get(name, 1.0)
