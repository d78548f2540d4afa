"""Choose LFTR's free parameters on model A, with tuning scenes only.

    python benchmarks/testbed/tune_lftr.py --json > benchmarks/results/lftr_tuning.json

Each setting answers the questions of three sets of scenes whose seeds no result is reported on. The
table gives its share of the unreduced accuracy at 4x, 8x and 16x, and their mean. ``tune_clips.py``
does the same with clips; the setting of the largest mean over both is chosen.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
import transformers

from tokenreduce_integrations.testbed.evaluation import Bootstrap, answer_questions, encode_scenes
from tokenreduce_integrations.testbed.models import card, load
from tokenreduce_strategies.lftr import LFTR

SEEDS = (111, 112, 113)
REDUCTIONS = (4.0, 8.0, 16.0)
REDUNDANT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SPARE = (1.5, 2.0, 3.0)


def tune(scenes: int) -> dict[str, Any]:
    """Evaluate the grid of settings on ``scenes`` scenes of each tuning seed."""
    model, processor = load("a")
    types = card("a")["reported_types"]
    sets = []
    for seed in SEEDS:
        encoded = encode_scenes(model, processor, seed=seed, scenes=scenes, types=types)
        sets.append((encoded, Bootstrap(encoded, resamples=2), answer_questions(model, encoded)))
    rows = []
    for redundant, spare in itertools.product(REDUNDANT, SPARE):
        shares = []
        for reduction in REDUCTIONS:
            reducer = LFTR(reduction=reduction, spare=spare, redundant=redundant)
            values = [
                bootstrap.share(answer_questions(model, encoded, reducer), unreduced).value
                for encoded, bootstrap, unreduced in sets
            ]
            shares.append(round(float(np.mean(values)), 4))
        rows.append(
            {
                "redundant": redundant,
                "spare": spare,
                "shares": shares,
                "mean": round(float(np.mean(shares)), 4),
            }
        )
    return {
        "model": "a",
        "scene_seeds": SEEDS,
        "scenes_per_seed": scenes,
        "types": types,
        "reductions": REDUCTIONS,
        "rows": sorted(rows, key=lambda row: -row["mean"]),
    }


def main() -> None:
    """Parse the command line and tune."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=200, help="of each tuning seed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    result = tune(options.scenes)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
