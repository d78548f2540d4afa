"""Accuracy of reduction strategies on a testbed model, with paired intervals.

    python benchmarks/testbed/compare.py --model b --scenes 1000 --seed 30001 --json
    python benchmarks/testbed/compare.py --model video --scenes 500 --seed 30001 --json
    python benchmarks/testbed/compare.py --model video --conditions shake=1 noise=8

Every strategy answers the same questions. Each row gives the macro accuracy over the question types
that the model has learned, its share of the unreduced accuracy, and the difference to each control
on the same questions; intervals are 95 % bootstraps over scenes. A strategy is non-inferior to
DivPrune if the lower end of that difference lies above -1.5 points. On clips the same stands
beside it for the questions that no single frame answers (``motion``).

Scenes of seed 101 to 199, the default among them, are for choosing parameters. Results are reported
on seeds from 30001, which nothing was chosen on.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import tokenreduce as tr
from tokenreduce.ops.covering import spread_around
from tokenreduce.ops.similarity import directions
from tokenreduce.reducer import Reducer
from tokenreduce_integrations.testbed.clips import MOTION_TYPES
from tokenreduce_integrations.testbed.conditions import Conditions
from tokenreduce_integrations.testbed.evaluation import (
    CONFIDENCE,
    RESAMPLES,
    Bootstrap,
    Correct,
    EncodedScenes,
    Estimate,
    answer_questions,
    encode_clips,
    encode_scenes,
    reduce_features,
)
from tokenreduce_integrations.testbed.models import MODEL_NAMES, VIDEO_MODEL_NAMES, card, load
from tokenreduce_strategies.lftr import LFTR

TUNING_SEED = 101
STRATEGIES = (
    "lftr",
    "divprune",
    "tome",
    "norm-topk",
    "random",
    "uniform",
    "avg-pool",
    "bilinear-pool",
)
CONTROLS = ("random", "uniform", "avg-pool", "divprune")
PER_FRAME = " per frame"
"""Ends the name of a strategy that reduces every frame of a clip by itself."""
VIDEO_STRATEGIES = (
    "lftr",
    "evs",
    "dycoke",
    "vidcom2",
    "flashvid",
    "framefusion",
    "holitom",
    "fastvid",
    "prunevid",
    "sttm",
    "vcast",
    "divprune",
    "divprune per frame",
    "tome per frame",
    "random",
    "uniform",
    "uniform per frame",
    "avg-pool",
)
CONDITION_STRATEGIES = (
    "lftr",
    "evs",
    "dycoke",
    "uniform per frame",
    "random",
    "vidcom2",
    "divprune",
    "framefusion",
)
VIDEO_CONTROLS = ("lftr", "uniform per frame", "random", "evs", "dycoke")
VIDEO_SIGNALS = ("class_attention",)
REDUCTIONS = (4.0, 8.0, 16.0)
MARGIN = 0.015
BOOTSTRAP_SEED = 0


def compare(
    name: str,
    *,
    scenes: int,
    seed: int,
    strategies: tuple[str, ...] | None = None,
    reductions: tuple[float, ...] = REDUCTIONS,
    conditions: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Evaluate strategies on a testbed model.

    Args:
        name: the model.
        scenes: number of held-out scenes, or of clips.
        seed: of the scenes.
        strategies: registered names, perhaps followed by " per frame"; the controls among them are
            what others are compared with. All that are of interest for the model if None.
        reductions: how many times fewer tokens.
        conditions: what clips are filmed under; see `Conditions`.

    Returns:
        one JSON document.
    """
    model, processor = load(name)
    about = card(name)
    types = about["reported_types"]
    if name in VIDEO_MODEL_NAMES:
        encoded = encode_clips(
            model,
            processor,
            seed=seed,
            clips=scenes,
            types=types,
            signals=VIDEO_SIGNALS,
            conditions=Conditions(**(conditions or {})),
        )
        usual = CONDITION_STRATEGIES if conditions else VIDEO_STRATEGIES
        strategies, controls = strategies or usual, VIDEO_CONTROLS
    else:
        encoded = encode_scenes(model, processor, seed=seed, scenes=scenes, types=types)
        strategies, controls = strategies or STRATEGIES, CONTROLS
    bootstrap = Bootstrap(encoded, seed=BOOTSTRAP_SEED)
    unreduced = answer_questions(model, encoded)
    motion = None
    if name in VIDEO_MODEL_NAMES:
        about_motion, chosen = encoded.only([kind for kind in types if kind in MOTION_TYPES])
        motion = Bootstrap(about_motion, seed=BOOTSTRAP_SEED)
    rows = []
    for reduction in reductions:
        reducers = {strategy: reducer_named(strategy, reduction) for strategy in strategies}
        answers, seconds = {}, {}
        for strategy, reducer in reducers.items():
            started = time.perf_counter()
            answers[strategy] = answer_questions(model, encoded, reducer)
            seconds[strategy] = time.perf_counter() - started
        for strategy, reducer in reducers.items():
            others = {
                control: answers[control]
                for control in controls
                if control in answers and control != strategy
            }
            row = {
                "strategy": strategy,
                "options": _options(reducer),
                "reduction": reduction,
                "kept": _kept(reducer, encoded),
                **_estimates(bootstrap, answers[strategy], unreduced, others),
                "by_type": _by_type(bootstrap, answers[strategy]),
                "seconds": round(seconds[strategy], 2),
            }
            if "divprune" in row["difference"]:
                row["non_inferior_to_divprune"] = row["difference"]["divprune"]["low"] > -MARGIN
            if motion:
                row["motion"] = _estimates(
                    motion,
                    answers[strategy][chosen],
                    unreduced[chosen],
                    {control: other[chosen] for control, other in others.items()},
                )
            rows.append(row)
    return {
        "model": name,
        "model_finished": about["finished"],
        "scenes": scenes,
        "questions": len(unreduced),
        "types": list(encoded.types),
        "unreported_types": about["unreported_types"],
        "scene_seed": seed,
        **({"conditions": dict(conditions), "changed": _changed(encoded)} if conditions else {}),
        "bootstrap": {"seed": BOOTSTRAP_SEED, "resamples": RESAMPLES, "confidence": CONFIDENCE},
        "margin": MARGIN,
        "tokens": encoded.features.shape[1],
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenreduce": tr.__version__,
        },
        "unreduced": {
            "macro": _rounded(bootstrap.macro(unreduced)),
            "by_type": _by_type(bootstrap, unreduced),
            **({"motion": _rounded(motion.macro(unreduced[chosen]))} if motion else {}),
        },
        "rows": rows,
    }


def reducer_named(strategy: str, reduction: float) -> Reducer:
    """A strategy by its registered name, perhaps followed by " per frame"."""
    if strategy.endswith(PER_FRAME):
        inner = tr.create_strategy(strategy.removesuffix(PER_FRAME))
        return tr.per_frame(inner, reduction=reduction)
    return tr.create_strategy(strategy, reduction=reduction)


def _options(reducer: Reducer) -> dict[str, Any]:
    """Options in a form that JSON has."""
    return {
        name: value if isinstance(value, str | int | float | None) else repr(value)
        for name, value in reducer.options().items()
    }


def _kept(reducer: Reducer, encoded: EncodedScenes) -> int:
    """Tokens that the language model reads of the first scene."""
    signals = {name: signal[:1] for name, signal in encoded.signals.items()}
    return reduce_features(reducer, encoded.features[:1], encoded.layout, signals).kept


def _changed(encoded: EncodedScenes) -> float:
    """Share of tokens that LFTR does not take for a repetition of the frame before."""
    grid = encoded.layout.select(encoded.layout.free).grid
    unit = directions(encoded.features[:, encoded.layout.free]).unflatten(1, (grid[0], -1))
    spread = spread_around(unit.mean((1, 2)))
    apart = (1 - (unit[:, 1:] * unit[:, :-1]).sum(-1)) / spread[:, None, None]
    return round(float((apart > LFTR.still).float().mean()), 4)


def _by_type(bootstrap: Bootstrap, correct: Correct) -> dict[str, float]:
    return {kind: round(value, 4) for kind, value in bootstrap.by_type(correct).items()}


def _estimates(
    bootstrap: Bootstrap, correct: Correct, unreduced: Correct, others: dict[str, Correct]
) -> dict[str, Any]:
    """Accuracy, its share of the unreduced one, and differences to others."""
    return {
        "macro": _rounded(bootstrap.macro(correct)),
        "share": _rounded(bootstrap.share(correct, unreduced)),
        "difference": {
            name: _rounded(bootstrap.difference(correct, other)) for name, other in others.items()
        },
    }


def _rounded(estimate: Estimate) -> dict[str, float]:
    return {end: round(getattr(estimate, end), 4) for end in ("value", "low", "high")}


def _points(estimate: dict[str, float] | None) -> str:
    if estimate is None:
        return ""
    value, low, high = (100 * estimate[end] for end in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(result: dict[str, Any]) -> str:
    """The rows as text; differences in points, with their intervals."""
    macro = result["unreduced"]["macro"]
    controls = VIDEO_CONTROLS if result["model"] in VIDEO_MODEL_NAMES else CONTROLS
    about = (
        f"model {result['model']}, {result['scenes']} scenes of seed {result['scene_seed']}, "
        f"{result['questions']} questions; unreduced ({result['tokens']} tokens) "
        f"{100 * macro['value']:.1f} [{100 * macro['low']:.1f}, {100 * macro['high']:.1f}]"
    )
    lines = [
        about,
        f"{'strategy':20}{'tokens':>7}{'macro':>8}{'share':>8}{'interval':>16}"
        + "".join(f"{'- ' + control:>22}" for control in controls)
        + "  non-inferior",
    ]
    for row in result["rows"]:
        macro, share = row["macro"], row["share"]
        interval = f"[{100 * macro['low']:.1f}, {100 * macro['high']:.1f}]"
        verdict = {True: "yes", False: "no", None: ""}[row.get("non_inferior_to_divprune")]
        lines.append(
            f"{row['strategy']:20}{row['kept']:>7}{100 * macro['value']:>8.1f}"
            f"{100 * share['value']:>8.1f}{interval:>16}"
            + "".join(f"{_points(row['difference'].get(control)):>22}" for control in controls)
            + f"  {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and evaluate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=(*MODEL_NAMES, *VIDEO_MODEL_NAMES), default="a")
    parser.add_argument("--scenes", type=int, default=400, help="or clips")
    parser.add_argument("--seed", type=int, default=TUNING_SEED, help="of the scenes")
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--reductions", nargs="+", type=float, default=REDUCTIONS)
    parser.add_argument(
        "--conditions", nargs="+", default=[], help="of clips, as NAME=NUMBER; see Conditions"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args()
    if options.conditions and options.model not in VIDEO_MODEL_NAMES:
        parser.error(f"--conditions are of clips, and model {options.model} sees pictures")
    pairs = [condition.split("=") for condition in options.conditions]
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    result = compare(
        options.model,
        scenes=options.scenes,
        seed=options.seed,
        strategies=tuple(options.strategies) if options.strategies else None,
        reductions=tuple(options.reductions),
        conditions={name: json.loads(value) for name, value in pairs},
    )
    document = json.dumps(result, indent=2)
    print(document if options.json else table(result))
    if options.out:
        options.out.write_text(document + "\n")


if __name__ == "__main__":
    main()
