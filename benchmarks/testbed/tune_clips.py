"""Choose LFTR's free parameters on the model for clips, with tuning clips only.

    python benchmarks/testbed/tune_clips.py --json > benchmarks/results/lftr_clips_tuning.json

Each setting answers the questions of three sets of clips whose seeds no result is reported on. The
table gives its share of the unreduced accuracy at 4x, 8x and 16x, over all question types and over
those that no single frame answers, and the means. ``redundant`` and ``spare`` are chosen on clips
and pictures together (``tune_lftr.py``), ``still``, which is idle on pictures, on clips alone.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
import transformers
from tune_lftr import REDUCTIONS, SEEDS

from tokenreduce_integrations.testbed.clips import MOTION_TYPES
from tokenreduce_integrations.testbed.evaluation import Bootstrap, answer_questions, encode_clips
from tokenreduce_integrations.testbed.models import load, reported_types
from tokenreduce_strategies.lftr import LFTR

STILL = (0.1, 0.15, 0.25, 0.35)
REDUNDANT = (0.0, 0.1, 0.2, 0.3, 0.5)
SPARE = (1.5, 2.0)


def settings() -> list[dict[str, float]]:
    """``redundant`` varied with ``spare`` at the default ``still``, and with ``still``."""
    grid = [
        *itertools.product((LFTR.still,), REDUNDANT, SPARE),
        *itertools.product(STILL, REDUNDANT, (LFTR.spare,)),
    ]
    return [
        dict(zip(("still", "redundant", "spare"), row, strict=True)) for row in dict.fromkeys(grid)
    ]


def tune(clips: int) -> dict[str, Any]:
    """Evaluate the settings on ``clips`` clips of each tuning seed."""
    model, processor = load("video")
    types = reported_types("video")
    motion = tuple(kind for kind in types if kind in MOTION_TYPES)
    sets = []
    for seed in SEEDS:
        encoded = encode_clips(model, processor, seed=seed, clips=clips, types=types)
        about_motion, chosen = encoded.only(motion)
        statistics = Bootstrap(encoded, resamples=2), Bootstrap(about_motion, resamples=2)
        sets.append((encoded, chosen, statistics, answer_questions(model, encoded)))
    rows = []
    for setting in settings():
        shares, motion_shares = [], []
        for reduction in REDUCTIONS:
            reducer = LFTR(reduction=reduction, **setting)
            values = []
            for encoded, chosen, (overall, on_motion), unreduced in sets:
                correct = answer_questions(model, encoded, reducer)
                motion_share = on_motion.share(correct[chosen], unreduced[chosen])
                values.append((overall.share(correct, unreduced).value, motion_share.value))
            share, motion_share = np.mean(values, 0)
            shares.append(round(float(share), 4))
            motion_shares.append(round(float(motion_share), 4))
        rows.append(
            {
                **setting,
                "shares": shares,
                "motion_shares": motion_shares,
                "mean": round(float(np.mean(shares)), 4),
                "motion_mean": round(float(np.mean(motion_shares)), 4),
            }
        )
    return {
        "model": "video",
        "clip_seeds": SEEDS,
        "clips_per_seed": clips,
        "types": types,
        "motion_types": motion,
        "reductions": REDUCTIONS,
        "rows": rows,
    }


def main() -> None:
    """Parse the command line and tune."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=80, help="of each tuning seed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = tune(options.clips)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
