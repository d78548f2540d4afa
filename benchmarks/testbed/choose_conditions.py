"""Choose how hard the conditions are that clips are filmed under, by the unreduced model alone.

    python benchmarks/testbed/choose_conditions.py > benchmarks/results/clip_conditions.json

The rule: of the strengths of a condition, weakest first, the last before the unreduced accuracy on
questions that no single frame answers falls below 90 %, on clips of the tuning seeds. No reduction
is looked at. A condition without such a strength is left out.
"""

import json
from dataclasses import asdict
from itertools import takewhile
from typing import Any

import torch
import transformers
from tune_lftr import SEEDS

from tokenreduce_integrations.testbed.clips import MOTION_TYPES
from tokenreduce_integrations.testbed.conditions import Conditions
from tokenreduce_integrations.testbed.evaluation import Bootstrap, answer_questions, encode_clips
from tokenreduce_integrations.testbed.models import load, reported_types

CLIPS = 80
"""Of each tuning seed."""
LEAST = 0.9
"""Unreduced accuracy on motion that a condition must leave."""
STRENGTHS = {
    "noise": [Conditions(noise=sigma) for sigma in (8, 12, 16, 24, 32, 48)],
    "flicker": [Conditions(flicker=share) for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)],
    "shake": [Conditions(shake=pixels) for pixels in (1, 2, 3, 4, 6)],
    "pan": [Conditions(pan=pixels) for pixels in (0.5, 1, 1.5, 2, 3, 4)],
    "ripple": [Conditions(ripple=pixels) for pixels in (1, 2, 3, 4, 6, 8)],
    "bars": [Conditions(bars=count) for count in (2, 4, 8, 16, 32)],
    "handheld": [
        Conditions(noise=sigma, flicker=share, shake=pixels)
        for sigma, share, pixels in (
            (4, 0.05, 1),
            (8, 0.1, 1),
            (8, 0.1, 2),
            (12, 0.2, 2),
            (16, 0.3, 3),
            (24, 0.4, 4),
            (32, 0.5, 6),
        )
    ],
}
"""Conditions and their strengths, weakest first."""


def changed(conditions: Conditions) -> dict[str, float]:
    """The values of conditions that are not the default."""
    return {name: value for name, value in asdict(conditions).items() if value}


def choose() -> dict[str, Any]:
    """Answer the questions of the tuning clips under every strength of every condition."""
    model, processor = load("video")
    types = reported_types("video")
    motion_types = [kind for kind in types if kind in MOTION_TYPES]

    def accuracies(conditions: Conditions) -> tuple[float, float]:
        """On motion and on all types, averaged over the seeds."""
        found = []
        for seed in SEEDS:
            encoded = encode_clips(
                model, processor, seed=seed, clips=CLIPS, types=types, conditions=conditions
            )
            correct = answer_questions(model, encoded)
            about_motion, chosen = encoded.only(motion_types)
            motion = Bootstrap(about_motion, resamples=1).macro(correct[chosen]).value
            found.append((motion, Bootstrap(encoded, resamples=1).macro(correct).value))
        motion, macro = (round(sum(values) / len(SEEDS), 4) for values in zip(*found, strict=True))
        return motion, macro

    rows, chosen = [], {}
    for name, strengths in STRENGTHS.items():
        measured = [(strength, *accuracies(strength)) for strength in strengths]
        rows += [
            {"condition": name, "conditions": changed(strength), "motion": motion, "macro": macro}
            for strength, motion, macro in measured
        ]
        borne = list(takewhile(lambda row: row[1] >= LEAST, measured))
        if borne:
            chosen[name] = changed(borne[-1][0])
    return {
        "model": "video",
        "clip_seeds": SEEDS,
        "clips_per_seed": CLIPS,
        "motion_types": motion_types,
        "least_motion": LEAST,
        "chosen": chosen,
        "rows": rows,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    print(json.dumps(choose(), indent=2))
