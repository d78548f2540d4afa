"""Choose LFTR's free parameters on model A, with tuning scenes only.

    python benchmarks/testbed/tune_lftr.py --json > benchmarks/results/lftr_tuning.json

Each setting answers the questions of three sets of scenes whose seeds no result is reported on. The
table gives its share of the unreduced accuracy at 4x, 8x and 16x, and their mean. Settings that
differ by less than half a point are not told apart here; the round numbers among them are preferred.
"""

import argparse
import itertools
import json
from typing import Any

import numpy as np
import torch
import transformers

import tokenreduce_strategies.lftr as lftr
from tokenreduce_integrations.testbed.evaluation import Bootstrap, answer_questions, encode_scenes
from tokenreduce_integrations.testbed.models import card, load

SEEDS = (111, 112, 113)
REDUCTIONS = (4.0, 8.0, 16.0)
SPARE = (1.0, 1.5, 2.0, 3.0)
REDUNDANT = (0.25, 0.5)
SIZE_POWERS = (0.5, 1.0)
WHOLE_POWERS = (0.0, 0.5, 1.0)


def tune(scenes: int) -> dict[str, Any]:
    """Evaluate the grid of settings on ``scenes`` scenes of each tuning seed."""
    model, processor = load("a")
    types = card("a")["reported_types"]
    sets = []
    for seed in SEEDS:
        encoded = encode_scenes(model, processor, seed=seed, scenes=scenes, types=types)
        sets.append((encoded, Bootstrap(encoded, resamples=2), answer_questions(model, encoded)))
    rows = []
    grid = itertools.product(SPARE, REDUNDANT, SIZE_POWERS, WHOLE_POWERS)
    chosen = lftr.SIZE_POWER, lftr.WHOLE_POWER
    for spare, redundant, size_power, whole_power in grid:
        vars(lftr).update(SIZE_POWER=size_power, WHOLE_POWER=whole_power)
        shares = []
        for reduction in REDUCTIONS:
            reducer = lftr.LFTR(reduction=reduction, spare=spare, redundant=redundant)
            values = [
                bootstrap.share(answer_questions(model, encoded, reducer), unreduced).value
                for encoded, bootstrap, unreduced in sets
            ]
            shares.append(round(float(np.mean(values)), 4))
        rows.append(
            {
                "spare": spare,
                "redundant": redundant,
                "size_power": size_power,
                "whole_power": whole_power,
                "shares": shares,
                "mean": round(float(np.mean(shares)), 4),
            }
        )
    vars(lftr).update(SIZE_POWER=chosen[0], WHOLE_POWER=chosen[1])
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
