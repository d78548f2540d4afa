"""Write ``docs/results/strategies.md`` and its plots from the committed comparisons.

python benchmarks/testbed/report_strategies.py
"""

from __future__ import annotations

from pathlib import Path

from tokenreduce_integrations.evaluation.choosing import EVIDENCE
from tokenreduce_integrations.evaluation.plotting import draw_pareto
from tokenreduce_integrations.evaluation.schema import (
    Comparison,
    Estimate,
    Run,
    Versus,
    read_comparison,
)

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "strategies.md"
ASSETS = ROOT / "docs" / "assets"
#: The committed comparisons in the order of the page, each with its heading and its sweep.
SECTIONS = {
    "testbed-b": ("Pictures", "strategies.yaml"),
    "testbed-video": ("Clips", "strategies_video.yaml"),
}
COMPARATORS = ("random", "uniform", "avg-pool", "divprune")


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * value:.1f}"


def interval(estimate: Estimate) -> str:
    """A value with its interval, in percent."""
    return f"{percent(estimate.value)} [{percent(estimate.low)}, {percent(estimate.high)}]"


def difference(versus: Versus | None) -> str:
    """A difference in points with its interval, marked where it is significant."""
    if versus is None:
        return "-"
    d = versus.difference
    mark = "\\*" if versus.p_holm < 0.05 else ""
    return f"{100 * d.value:+.1f}{mark} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"


def results_table(found: Comparison, budget: str) -> list[str]:
    """Every run of a budget, from the most to the least accurate."""
    lines = [
        "| strategy | site | tokens | accuracy | share of unreduced | "
        + " | ".join(f"- {name}" for name in COMPARATORS)
        + " | MFLOPs |",
        "|" + "---|" * (6 + len(COMPARATORS)),
    ]
    runs = [run for run in found.runs if run.budget == budget]
    for run in sorted(runs, key=lambda run: -run.accuracy.value):
        versus = {found.run(v.other).strategy: v for v in run.versus}
        cells = [
            f"*{run.strategy}*" if run.role == "control" else run.strategy,
            ", ".join(run.sites),
            f"{run.tokens.layer_average:.1f}".removesuffix(".0"),
            interval(run.accuracy),
            "-" if run.share is None else percent(run.share.value),
            *(difference(versus.get(name)) for name in COMPARATORS),
            "-" if run.cost is None else f"{run.cost.flops['total'] / 1e6:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def refusals(found: Comparison) -> list[str]:
    """What cannot run, once a strategy and site."""
    reasons: dict[tuple[str, str], str] = {}
    for refusal in found.refused:
        reason = refusal.reason.partition(" What would work:")[0].replace("|", "\\|")
        reasons.setdefault((refusal.strategy, ", ".join(refusal.sites)), reason)
    if not reasons:
        return []
    return [
        "Not in the tables, with the reason at the first budget:",
        "",
        "| strategy | site | reason |",
        "|---|---|---|",
        *(f"| {name} | {site} | {reason} |" for (name, site), reason in reasons.items()),
        "",
    ]


def section(name: str, found: Comparison) -> list[str]:
    """Everything about one model."""
    heading, sweep = SECTIONS[name]
    whole: Run = next(run for run in found.runs if run.role == "unreduced")
    lines = [
        f"## {heading}",
        "",
        (
            f"Model `{whole.model}`, {found.data.samples:,} questions about {found.data.groups:,} "
            f"held-out {heading.lower()} (`{found.data.source}`). Unreduced, with "
            f"{whole.tokens.tokens_in:.0f} tokens: {interval(whole.accuracy)}."
        ),
        "",
        f"![accuracy against tokens and FLOPs](../assets/{name}.png)",
        "",
    ]
    for budget in dict.fromkeys(run.budget for run in found.runs if run.budget):
        lines += [f"### {heading} at {budget.removeprefix('reduction=')}x", ""]
        lines += [*results_table(found, budget), ""]
    versions = ", ".join(f"{key} {value}" for key, value in found.versions.items())
    return [
        *lines,
        *refusals(found),
        "```text",
        f"tokenreduce compare benchmarks/testbed/{sweep} --processes 2 --out results",
        "```",
        "",
        f"{found.device}, {versions}.",
        "",
    ]


def read_documents() -> dict[str, Comparison]:
    """The committed comparisons, in the order of the page."""
    files = {name: EVIDENCE / f"{name}.json" for name in SECTIONS}
    return {name: read_comparison(file) for name, file in files.items() if file.exists()}


def page(documents: dict[str, Comparison]) -> str:
    """The text of the page."""
    method = next(iter(documents.values())).method
    lines = [
        "# Every strategy on the testbed",
        "",
        "Written by `benchmarks/testbed/report_strategies.py` from the comparisons that ship with "
        "the package (`tokenreduce_integrations/evaluation/evidence`), which `tokenreduce choose` "
        "reads too.",
        "",
        (
            "Every registered strategy of the projector and vision sites with its defaults, on the "
            "[testbed](testbed.md)'s tiny trained models. The score is the macro average over "
            f"question types; intervals are {100 * method.confidence:.0f} % bootstraps over "
            "pictures or clips, and those of differences (in points, on the same questions) are "
            "paired. A star marks p < 0.05 in a permutation test that swaps whole pictures, "
            "corrected by Holm's method for all comparisons of the model. Controls are in italics. "
            "MFLOPs are those of the first token, encoder and selection included."
        ),
        "",
    ]
    for name, found in documents.items():
        lines += section(name, found)
    return "\n".join(
        [
            *lines,
            "## What this does not show",
            "",
            "- Small models and rendered scenes with much plain background: orderings may differ "
            "on photographs and documents. Class attention, keys and norms are those of encoders "
            "that were trained on such scenes, not CLIP's.",
            "- One training run of each model: the intervals are over scenes, not over trainings.",
            "- On single pictures, what video strategies do along time is idle.",
            "- Defaults, not settings tuned for these models; but `lftr`'s were chosen on another "
            "model of pictures and on this model of clips, with other clips.",
            "",
        ]
    )


def main() -> None:
    """Write the page and the plots."""
    documents = read_documents()
    for name, found in documents.items():
        draw_pareto(found, ASSETS / f"{name}.png")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page(documents), encoding="utf-8")


if __name__ == "__main__":
    main()
