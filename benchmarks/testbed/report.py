"""Write ``docs/results/testbed.md`` and its plot from the committed results.

python benchmarks/testbed/report.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "testbed.md"
PLOT = ROOT / "docs" / "assets" / "testbed_curve.png"
CONTROLS = ("random", "uniform", "avg-pool", "divprune")
TARGETS = {4.0: 0.99, 8.0: 0.975, 16.0: 0.95}
STYLES = {
    "lftr": ("#d62728", "o", "-"),
    "divprune": ("#1f77b4", "s", "-"),
    "tome": ("#2ca02c", "^", "-"),
    "norm-topk": ("#9467bd", "v", "-"),
    "random": ("#7f7f7f", "x", "--"),
    "uniform": ("#8c564b", "+", "--"),
    "avg-pool": ("#ff7f0e", "d", "--"),
    "bilinear-pool": ("#bcbd22", "p", "--"),
}


def percent(value: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * value:.1f}"


def interval(estimate: dict[str, float]) -> str:
    """A value with its interval, in percent."""
    return f"{percent(estimate['value'])} [{percent(estimate['low'])}, {percent(estimate['high'])}]"


def difference(estimate: dict[str, float] | None) -> str:
    """A difference in points with its interval."""
    if estimate is None:
        return "-"
    value, low, high = (100 * estimate[end] for end in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def results_table(result: dict[str, Any]) -> list[str]:
    """One row for each strategy and budget."""
    lines = [
        (
            "| kept | strategy | accuracy | share of unreduced | - random | - uniform | - avg-pool "
            "| - divprune | non-inferior to divprune |"
        ),
        "|" + "---|" * 9,
    ]
    for row in result["rows"]:
        name = f"**{row['strategy']}**" if row["strategy"] == "lftr" else row["strategy"]
        verdict = {True: "yes", False: "no", None: "-"}[row.get("non_inferior_to_divprune")]
        cells = [
            f"{row['kept']} ({row['reduction']:g}x)",
            name,
            interval(row["macro"]),
            percent(row["share"]["value"]),
            *(difference(row["difference"].get(control)) for control in CONTROLS),
            verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def type_table(result: dict[str, Any]) -> list[str]:
    """Accuracy by question type of the unreduced model and of LFTR and DivPrune."""
    lines = [
        "| strategy | kept | " + " | ".join(result["types"]) + " |",
        "|" + "---|" * (2 + len(result["types"])),
    ]
    rows = [("unreduced", result["tokens"], result["unreduced"]["by_type"])]
    rows += [
        (row["strategy"], row["kept"], row["by_type"])
        for row in result["rows"]
        if row["strategy"] in ("lftr", "divprune") and row["reduction"] in TARGETS
    ]
    for name, kept, by_type in rows:
        cells = [name, str(kept), *(percent(by_type[kind]) for kind in result["types"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdicts(result: dict[str, Any]) -> list[str]:
    """How LFTR meets its targets on one model."""
    lines = [
        (
            "| reduction | target | share of unreduced | met | above random, uniform, avg-pool "
            "| non-inferior to divprune |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        target = TARGETS.get(row["reduction"])
        if row["strategy"] != "lftr" or target is None:
            continue
        above = all(row["difference"][control]["low"] > 0 for control in CONTROLS[:3])
        cells = [
            f"{row['reduction']:g}x",
            f"{percent(target)} %",
            interval(row["share"]),
            "yes" if row["share"]["value"] >= target else "no",
            "yes" if above else "no",
            "yes" if row["non_inferior_to_divprune"] else "no",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def model_section(result: dict[str, Any], heading: str) -> list[str]:
    """Everything about one model."""
    left_out = ", ".join(result["unreported_types"]) or "none"
    return [
        f"## {heading}",
        "",
        (
            f"{result['scenes']} scenes of seed {result['scene_seed']}, {result['questions']} "
            f"distinct questions of the types {', '.join(result['types'])} (left out because the "
            f"model has not learned them: {left_out}). Unreduced, with {result['tokens']} tokens: "
            f"{interval(result['unreduced']['macro'])}."
        ),
        "",
        "LFTR against its targets:",
        "",
        *verdicts(result),
        "",
        "All strategies; differences in points, on the same questions:",
        "",
        *results_table(result),
        "",
        "By question type:",
        "",
        *type_table(result),
        "",
    ]


def tuning_section(tuning: dict[str, Any], rows: int = 8) -> list[str]:
    """The best settings of the grid, and the range that the grid spans."""
    reductions = [f"{reduction:g}x" for reduction in tuning["reductions"]]
    settings = ("redundant", "spare")
    lines = [
        "## How LFTR's parameters were chosen",
        "",
        (
            f"On model A, with {tuning['scenes_per_seed']} scenes of each of the seeds "
            f"{', '.join(map(str, tuning['scene_seeds']))}; no result above uses these scenes, and "
            "nothing was chosen on model B. Share of the unreduced accuracy in percent; the best "
            f"{rows} of {len(tuning['rows'])} settings and the worst:"
        ),
        "",
        "| redundant | spare | " + " | ".join(reductions) + " | mean |",
        "|" + "---|" * (3 + len(reductions)),
    ]
    for row in [*tuning["rows"][:rows], tuning["rows"][-1]]:
        cells = [f"{row[name]:g}" for name in settings]
        cells += [percent(share) for share in [*row["shares"], row["mean"]]]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw(results: dict[str, dict[str, Any]]) -> None:
    """Accuracy against kept tokens, one panel for each model."""
    figure, panels = plt.subplots(1, len(results), figsize=(11, 4.4), sharey=True)
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        for strategy, (color, marker, line) in STYLES.items():
            rows = sorted(
                (row for row in result["rows"] if row["strategy"] == strategy),
                key=lambda row: row["kept"],
            )
            kept = [row["kept"] for row in rows]
            values = [100 * row["macro"]["value"] for row in rows]
            axes.plot(kept, values, color=color, marker=marker, linestyle=line, label=strategy)
            if strategy == "lftr":
                low = [100 * row["macro"]["low"] for row in rows]
                high = [100 * row["macro"]["high"] for row in rows]
                axes.fill_between(kept, low, high, color=color, alpha=0.15, linewidth=0)
        unreduced = 100 * result["unreduced"]["macro"]["value"]
        axes.axhline(unreduced, color="black", linewidth=0.8, linestyle=":")
        axes.text(9, unreduced + 0.7, f"unreduced ({result['tokens']} tokens)", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([9, 18, 36, 72], ["9", "18", "36", "72"])
        axes.set_xlabel("kept visual tokens")
        axes.set_title(f"testbed model {name.upper()}", fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("macro accuracy, %")
    panels[-1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)


def main() -> None:
    """Write the page and the plot."""
    results = {
        name: json.loads((RESULTS / f"testbed_{name}.json").read_text()) for name in ("a", "b")
    }
    tuning = json.loads((RESULTS / "lftr_tuning.json").read_text())
    draw(results)
    versions = ", ".join(f"{name} {value}" for name, value in results["b"]["versions"].items())
    seconds = sum(row["seconds"] for row in results["b"]["rows"])
    lines = [
        "# Accuracy on the testbed",
        "",
        "Written by `benchmarks/testbed/report.py` from `benchmarks/results/*.json`.",
        "",
        (
            "Two tiny LLaVA-architecture models, trained from scratch on rendered scenes with real "
            "handwritten digits, answer one-word questions about held-out scenes. The 144 visual "
            "tokens are reduced after the projector and keep their original positions. The vision "
            "tower of A was trained with a label for each patch, which separates contents cleanly; "
            "that of B never saw one."
        ),
        "",
        (
            "The score is the macro average over question types; no question occurs twice in a "
            "scene; intervals are 95 % bootstraps over scenes, those of differences are paired. "
            f"*Non-inferior* means that the lower end lies above -{100 * results['b']['margin']:g} "
            "points."
        ),
        "",
        "![accuracy against kept tokens](../assets/testbed_curve.png)",
        "",
        *model_section(results["b"], "Model B (nothing was chosen on it)"),
        *model_section(results["a"], "Model A"),
        *tuning_section(tuning),
        "## What this does not show",
        "",
        (
            "- Small models, 96 x 96 pixels, synthetic scenes with much plain background: "
            "orderings may differ on photographs and documents."
        ),
        "- One training run of each model. The intervals are over scenes, not over trainings.",
        "- norm-topk is at its worst here: these encoders give the background the larger norms.",
        "- Images only: the temporal step of LFTR is idle.",
        "",
        "## Run it",
        "",
        "```",
        *(
            f"python benchmarks/testbed/compare.py --model {name} --scenes {result['scenes']} "
            f"--seed {result['scene_seed']} --reductions "
            + " ".join(f"{r:g}" for r in dict.fromkeys(row["reduction"] for row in result["rows"]))
            + f" --out benchmarks/results/testbed_{name}.json"
            for name, result in results.items()
        ),
        "python benchmarks/testbed/report.py",
        "```",
        "",
        f"{results['b']['device']}, {versions}; {seconds:.0f} s for all rows of B.",
        "",
    ]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
