"""Write ``docs/results/video.md`` and its plot from the committed results.

python benchmarks/testbed/report_video.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from cells import difference, interval, percent
from matplotlib import pyplot as plt

from tokenreduce_integrations.testbed.clips import MOTION_TYPES, ClipGenerator
from tokenreduce_integrations.testbed.models import card
from tokenreduce_strategies.lftr import LFTR

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "results" / "video.md"
PLOT = ROOT / "docs" / "assets" / "video_curve.png"
FRAMES = ROOT / "docs" / "assets" / "video_clip.png"
SHOWN = (0, 6)
"""Seed and index of the clip that the page shows."""
COMPARED = ("uniform per frame", "random", "evs", "dycoke")
"""What LFTR is to beat on the questions about motion."""
DESCRIBED = {
    "noise": "standard deviation of noise in every pixel, beside the 2 to 8 that every clip has",
    "flicker": "the exposure of each frame is off by up to this share",
    "shake": "each frame is off by up to so many pixels along and across",
    "pan": "pixels that the camera moves from frame to frame, in any direction",
    "ripple": "pixels by which a wave that travels through the background displaces it",
    "bars": "grey bars that pass behind the shapes, each in its own direction",
    "handheld": "noise, flicker and shake together",
}
"""What the strength of each condition says."""
DRAWN = {
    "lftr": ("#d62728", "o", "-"),
    "evs": ("#1f77b4", "s", "-"),
    "dycoke": ("#2ca02c", "^", "-"),
    "holitom": ("#9467bd", "v", "-"),
    "prunevid": ("#17becf", "<", "-"),
    "flashvid": ("#e377c2", ">", "-"),
    "divprune": ("#bcbd22", "p", "-"),
    "random": ("#7f7f7f", "x", "--"),
    "uniform per frame": ("#8c564b", "+", "--"),
    "avg-pool": ("#ff7f0e", "d", "--"),
}


def model_table(about: dict[str, Any]) -> list[str]:
    """What the unreduced model answers."""
    lines = ["| type | questions | most frequent answer | accuracy | reported |", "|" + "---|" * 5]
    for kind, result in about["evaluation"]["by_type"].items():
        reported = "yes" if kind in about["reported_types"] else "no"
        cells = [kind, f"{result['questions']:,}", percent(result["majority"])]
        cells += [percent(result["accuracy"]), reported]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def results_table(result: dict[str, Any], reduction: float) -> list[str]:
    """All strategies at one budget, the best on motion first."""
    lines = [
        "| strategy | kept | motion | motion, less LFTR's | all types | all types, less LFTR's |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in result["rows"] if row["reduction"] == reduction]
    for row in sorted(rows, key=lambda row: -row["motion"]["macro"]["value"]):
        cells = [
            f"**{row['strategy']}**" if row["strategy"] == "lftr" else row["strategy"],
            str(row["kept"]),
            interval(row["motion"]["macro"]),
            difference(row["motion"]["difference"].get("lftr")),
            interval(row["macro"]),
            difference(row["difference"].get("lftr")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def verdicts(result: dict[str, Any]) -> list[str]:
    """LFTR against each of the strategies that it is to beat, on motion."""
    lines = [
        "| reduction | share of unreduced, motion | all types | "
        + " | ".join(f"less {name}" for name in COMPARED)
        + " | all above |",
        "|" + "---|" * (4 + len(COMPARED)),
    ]
    for row in lftr_rows(result):
        versus = {name: row["motion"]["difference"][name] for name in COMPARED}
        cells = [
            f"{row['reduction']:g}x",
            interval(row["motion"]["share"]),
            interval(row["share"]),
            *map(difference, versus.values()),
            above(versus),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def lftr_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """LFTR at each reduction."""
    return [row for row in result["rows"] if row["strategy"] == "lftr"]


def above(versus: dict[str, dict[str, float]]) -> str:
    """Whether the intervals of all differences lie above zero, or which do not."""
    others = [name for name, estimate in versus.items() if estimate["low"] <= 0]
    return f"not {', '.join(others)}" if others else "yes"


def strength(conditions: dict[str, float]) -> str:
    """Conditions as a cell has them: the number of one, the names of several."""
    if len(conditions) == 1:
        return f"{next(iter(conditions.values())):g}"
    return ", ".join(f"{name} {value:g}" for name, value in conditions.items())


def choice_table(choice: dict[str, Any]) -> list[str]:
    """The strength of each condition, and what the unreduced model bears of it."""
    lines = ["| condition | strength is | chosen | motion | next | motion |", "|" + "---|" * 6]
    for name, about in DESCRIBED.items():
        rows = [row for row in choice["rows"] if row["condition"] == name]
        places = [
            i for i, row in enumerate(rows) if row["conditions"] == choice["chosen"].get(name)
        ]
        after = places[0] + 1 if places else 0
        cells = [name, about]
        for row in (rows[after - 1] if places else None, *rows[after : after + 1]):
            cells += [strength(row["conditions"]), percent(row["motion"])] if row else ["-", "-"]
        cells += ["-"] * (6 - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def condition_verdicts(result: dict[str, Any], filmed: dict[str, dict[str, Any]]) -> list[str]:
    """LFTR against each of the strategies that it is to beat, on motion, under each condition."""
    lines = [
        "| condition | changed | unreduced | reduction | lftr | "
        + " | ".join(f"less {name}" for name in COMPARED)
        + " | all above |",
        "|" + "---|" * (6 + len(COMPARED)),
    ]
    for name, document in {"none": result, **filmed}.items():
        changed = percent(document["changed"]) if "changed" in document else "-"
        for row in lftr_rows(document):
            versus = {other: row["motion"]["difference"][other] for other in COMPARED}
            cells = [
                name,
                changed,
                percent(document["unreduced"]["motion"]["value"]),
                f"{row['reduction']:g}x",
                interval(row["motion"]["macro"]),
                *map(difference, versus.values()),
                above(versus),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def condition_summary(filmed: dict[str, dict[str, Any]]) -> list[str]:
    """Under which conditions LFTR is above those that it is to beat, and who is above LFTR."""
    lines = []
    for reduction in dict.fromkeys(
        row["reduction"] for document in filmed.values() for row in document["rows"]
    ):
        won, level, better = [], [], []
        for name, document in filmed.items():
            rows = {
                row["strategy"]: row["motion"]["difference"]
                for row in document["rows"]
                if row["reduction"] == reduction
            }
            versus = rows.pop("lftr")
            verdict = above({other: versus[other] for other in COMPARED})
            if verdict == "yes":
                won.append(name)
            else:
                level.append(f"{name} ({verdict.removeprefix('not ')})")
            better += [
                f"{other} ({name})" for other, less in rows.items() if less["lftr"]["low"] > 0
            ]
        but = f", not under {', '.join(level)}" if level else ""
        lines.append(
            f"- {reduction:g}x: LFTR is above all four under {', '.join(won)}{but}. "
            f"Above LFTR: {', '.join(better) or 'none'}."
        )
    return lines


def condition_table(filmed: dict[str, dict[str, Any]]) -> list[str]:
    """Accuracy on motion of the other strategies under each condition, less LFTR's beside it."""
    first = next(iter(filmed.values()))
    found = dict.fromkeys(row["strategy"] for row in first["rows"])
    names = [name for name in found if name not in ("lftr", *COMPARED)]
    lines = [
        "| condition | reduction | lftr | " + " | ".join(names) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for name, document in filmed.items():
        rows = {(row["reduction"], row["strategy"]): row for row in document["rows"]}
        for reduction in dict.fromkeys(row["reduction"] for row in document["rows"]):
            values = [rows[reduction, other]["motion"] for other in ("lftr", *names)]
            cells = [name, f"{reduction:g}x", percent(values[0]["macro"]["value"])]
            cells += [
                f"{percent(value['macro']['value'])} ({difference(value['difference']['lftr'])})"
                for value in values[1:]
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def type_table(result: dict[str, Any]) -> list[str]:
    """Accuracy by question type of the unreduced model, of LFTR, and of the best other method."""
    lines = [
        "| strategy | kept | " + " | ".join(result["types"]) + " |",
        "|" + "---|" * (2 + len(result["types"])),
    ]
    rows = [("unreduced", result["tokens"], result["unreduced"]["by_type"])]
    for reduction in dict.fromkeys(row["reduction"] for row in result["rows"]):
        of_budget = [row for row in result["rows"] if row["reduction"] == reduction]
        others = [row for row in of_budget if row["strategy"] != "lftr"]
        best = max(others, key=lambda row: row["motion"]["macro"]["value"])
        for row in (*(row for row in of_budget if row["strategy"] == "lftr"), best):
            rows.append((row["strategy"], row["kept"], row["by_type"]))
    for name, kept, by_type in rows:
        cells = [name, str(kept), *(percent(by_type[kind]) for kind in result["types"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tuning_table(tuning: dict[str, Any]) -> list[str]:
    """Shares of the unreduced accuracy on motion for each setting."""
    reductions = [f"{reduction:g}x" for reduction in tuning["reductions"]]
    lines = [
        "| still | redundant | spare | "
        + " | ".join(f"motion {name}" for name in (*reductions, "mean"))
        + " | all types, mean |",
        "|" + "---|" * (5 + len(reductions)),
    ]
    settings = ("still", "redundant", "spare")
    defaults = tuple(getattr(LFTR, name) for name in settings)
    for row in sorted(tuning["rows"], key=lambda row: [row[name] for name in settings]):
        values = tuple(row[name] for name in settings)
        if sum(value != default for value, default in zip(values, defaults, strict=True)) > 1:
            continue
        shares = [*row["motion_shares"], row["motion_mean"], row["mean"]]
        cells = [*(f"{value:g}" for value in values), *map(percent, shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cost_table(costs: dict[str, Any]) -> list[str]:
    """What two settings of ``still`` cost on a long synthetic clip."""
    lines = [
        "| still | mode | search | seconds | overlap with exact search on the whole clip |",
        "|" + "---|" * 5,
    ]
    for row in costs["rows"]:
        cells = [f"{row['still']:g}", row["mode"], f"`{row['backend']}`", f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['overlap_with_exact']:.3f}"]) + " |")
    return lines


def draw(result: dict[str, Any]) -> None:
    """Accuracy against kept tokens: on motion, and on all types."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    for axes, title in zip(panels, ("questions about motion", "all questions"), strict=True):
        about_motion = title.endswith("motion")
        for strategy, (color, marker, line) in DRAWN.items():
            rows = sorted(
                (row for row in result["rows"] if row["strategy"] == strategy),
                key=lambda row: row["kept"],
            )
            values = [row["motion"]["macro"] if about_motion else row["macro"] for row in rows]
            kept = [row["kept"] for row in rows]
            middle, low, high = (
                [100 * value[end] for value in values] for end in ("value", "low", "high")
            )
            axes.plot(kept, middle, color=color, marker=marker, linestyle=line, label=strategy)
            if strategy == "lftr":
                axes.fill_between(kept, low, high, color=color, alpha=0.15, linewidth=0)
        unreduced = result["unreduced"]["motion" if about_motion else "macro"]["value"]
        axes.axhline(100 * unreduced, color="black", linewidth=0.8, linestyle=":")
        axes.text(19, 100 * unreduced + 0.7, f"unreduced ({result['tokens']})", fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks([19, 37, 73], ["19", "37", "73"])
        axes.set_xlabel("kept visual tokens of a clip")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("macro accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=130)


def asked_about_clip() -> str:
    """Some questions about the clip that the page shows."""
    seed, index = SHOWN
    generator = ClipGenerator(seed)
    clip = generator.clip(index)
    asked = [question for question in generator.questions(clip) if question.type in MOTION_TYPES]
    return "; ".join(f"*{question.text[:-2]}?* {question.answer}" for question in asked)


def page() -> str:
    """The page."""
    result = read("testbed_video")
    choice = read("clip_conditions")
    filmed = {name: read(f"testbed_video_{name}") for name in choice["chosen"]}
    first = next(iter(filmed.values()))
    tuning = read("lftr_clips_tuning")
    costs = read("lftr_still_long_video")
    about = card("video")
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    reductions = list(dict.fromkeys(row["reduction"] for row in result["rows"]))
    seconds = sum(row["seconds"] for row in result["rows"])
    left_out = ", ".join(about["unreported_types"]) or "none"
    motion = ", ".join(kind for kind in MOTION_TYPES if kind in result["types"])
    lines = [
        "# Accuracy on clips",
        "",
        "Written by `benchmarks/testbed/report_video.py` from `benchmarks/results/*.json`.",
        "",
        (
            "A tiny model of LLaVA-OneVision's architecture answers one-word questions about "
            "rendered clips: 8 frames of 96 x 96 pixels, one or two shapes that move among others "
            "that do not, on a textured background that stands still, with noise. Frames are "
            "pooled to 6 x 6 tokens as LLaVA-OneVision does, so a clip is 288 tokens and a "
            "newline, which stands outside the budget. Tokens are reduced after the projector and "
            "keep their original positions."
        ),
        "",
        (
            "The vision tower and the projector are those of testbed model B, which learned from "
            "pictures; only the language model was trained on clips, with tokens missing at "
            "random in most steps. No strategy was used in training."
        ),
        "",
        (
            f"Unreduced, on {about['evaluation']['clips']:,} held-out clips with "
            f"{about['evaluation']['questions']:,} questions. A type is reported if it was learned "
            "at least 15 points above its most frequent answer."
        ),
        "",
        *model_table(about),
        "",
        f"![a clip](../assets/{FRAMES.name})",
        "",
        f"About this clip: {asked_about_clip()}.",
        "",
        "## Results",
        "",
        (
            f"{result['scenes']} clips of seed {result['scene_seed']}, {result['questions']:,} "
            f"distinct questions of the types {', '.join(result['types'])} (left out: {left_out}). "
            f"*Motion* is the mean over {motion}, which no single frame answers. "
            "Accuracy is the mean over question types in percent, "
            "differences are in points; intervals are 95 % bootstraps over clips, those of "
            "differences are paired. Unreduced: motion "
            f"{interval(result['unreduced']['motion'])}, all types "
            f"{interval(result['unreduced']['macro'])}."
        ),
        "",
        "LFTR on motion, against the methods that it is to beat:",
        "",
        *verdicts(result),
        "",
        "At 4x the temporal step of LFTR alone meets the budget: the frames differ in less than a "
        "quarter of their tokens, and it keeps what `evs` keeps. Clips that are "
        "[harder to read](#under-harder-conditions) tell the two apart.",
        "",
        "![accuracy against kept tokens](../assets/video_curve.png)",
        "",
    ]
    for reduction in reductions:
        lines += [f"At {reduction:g}x:", "", *results_table(result, reduction), ""]
    lines += [
        "By question type, beside the other strategy that does best on motion:",
        "",
        *type_table(result),
        "",
        "## Under harder conditions",
        "",
        (
            "The clips above stand stiller than filmed ones. Here the same model, trained on still "
            "clips alone, reads clips in which the same happens to the same shapes, filmed under "
            "conditions that it has never seen. How hard each is was chosen before any reduction "
            "was looked at: of the strengths that were tried, weakest first, the last before the "
            "unreduced accuracy on motion falls below "
            f"{100 * choice['least_motion']:g} % ({choice['clips_per_seed']} clips of each of the "
            f"seeds {', '.join(map(str, choice['clip_seeds']))}). All conditions that were tried "
            "are reported, and nothing of LFTR was chosen on them. Where no next one stands, "
            "none harder was tried."
        ),
        "",
        *choice_table(choice),
        "",
        (
            f"LFTR's accuracy on motion and its differences in points, on {first['scenes']} clips "
            f"of seed {first['scene_seed']} under each condition (without any, the "
            f"{result['scenes']} clips above). *Changed* is the share of tokens that differ from "
            "the same place in the frame before by more than `still`, which a method that keeps "
            "what changes must keep:"
        ),
        "",
        *condition_verdicts(result, filmed),
        "",
        "By the intervals, which are not corrected for their number (at 4x the differences from "
        "`evs` are small, and some of their lower ends lie close to zero):",
        "",
        *condition_summary(filmed),
        "",
        "Accuracy on motion of other methods, and in brackets that less LFTR's:",
        "",
        *condition_table(filmed),
        "",
        "## How `still` was chosen",
        "",
        (
            f"{tuning['clips_per_seed']} clips of each of the seeds "
            f"{', '.join(map(str, tuning['clip_seeds']))}; no result above uses these clips. Share "
            "of the unreduced accuracy in percent. `redundant` and `spare` were chosen on pictures "
            "and clips together ([the rule](testbed.md#how-lftrs-parameters-were-chosen)); other "
            "values stand beside the defaults."
        ),
        "",
        *tuning_table(tuning),
        "",
        (
            f"The default stays at `still={LFTR.still:g}`. Less answers a quarter of a point "
            "better over all types here (0.4 points on motion), and leaves more tokens for the "
            f"search on long clips ({costs['rows'][0]['n']:,} synthetic tokens, "
            f"{costs['reduction']:g}x, `benchmarks/long_video.py`, processor time on one thread):"
        ),
        "",
        *cost_table(costs),
        "",
        "## What this does not show",
        "",
        "- One small model, one training, synthetic clips of 8 frames; conditions are rendered "
        "too, and the features of this vision tower change little under them. Orderings may differ "
        "on filmed clips, on cuts, and on longer clips.",
        "- `order` asks which of two shapes moved first or last: who finds the two but not their "
        "order is right half of the time.",
        "- `evs` and `dycoke` keep the first frame, or every fourth, before anything else: of 8 "
        "frames that is all of the budget at 8x and beyond. On longer clips they have room.",
        "- Methods were tuned by their authors on other models and longer clips; their published "
        "settings are used here, whose segments and windows span more frames than a clip has. "
        "LFTR's were chosen on this model, with other clips.",
        "",
        "## Run it",
        "",
        "```text",
        f"python benchmarks/testbed/compare.py --model video --scenes {result['scenes']} "
        f"--seed {result['scene_seed']} --out benchmarks/results/testbed_video.json",
        "python benchmarks/testbed/tune_clips.py --json > "
        "benchmarks/results/lftr_clips_tuning.json",
        "python benchmarks/testbed/choose_conditions.py > benchmarks/results/clip_conditions.json",
        *(
            f"python benchmarks/testbed/compare.py --model video --scenes {document['scenes']} "
            f"--seed {document['scene_seed']} --conditions "
            + " ".join(f"{key}={value}" for key, value in document["conditions"].items())
            + f" --out benchmarks/results/testbed_video_{name}.json"
            for name, document in filmed.items()
        ),
        "python benchmarks/testbed/report_video.py",
        "```",
        "",
        f"{result['device']}, {versions}; {seconds:.0f} s for all rows, on a shared machine.",
        "",
    ]
    return "\n".join(lines)


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return document


def main() -> None:
    """Write the page, the plot and the picture."""
    draw(read("testbed_video"))
    Image.fromarray(np.concatenate(list(ClipGenerator(SHOWN[0]).clip(SHOWN[1]).frames), 1)).save(
        FRAMES
    )
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
