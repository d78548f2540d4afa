"""What each strategy costs beside its official code, both in Gram products.

``official_timings.json`` holds how long the functions that the authors published take, at the named
commits, in units of one product of the features with themselves that was timed in the same run: a
ratio that holds across machines. They ran on two threads of a CPU, in float32 on one item of 1024
channels, and only the function that reduces was timed, given attention maps and features. Ours run
likewise on the same grids, to as many tokens as the official function kept; what is timed is the
whole call, which also checks, gathers and accounts.

    python benchmarks/official.py --only divprune evs --tokens 576 2304 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from strategies import CHANNELS, machine
from tokenreduce.testing import Subject
from tokenreduce.testing.cost import measure_cost
from tokenreduce.tokens import Layout

TIMINGS = json.loads(Path(__file__).with_name("official_timings.json").read_text(encoding="utf-8"))


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The official timings asked for, with ours."""
    for official in TIMINGS:
        tokens = prod(official["grid"])
        if official["strategy"] not in arguments.only or tokens not in arguments.tokens:
            continue
        subject = Subject.of(official["strategy"])
        layout = Layout.from_grid(official["grid"])
        cost = measure_cost(
            subject.create(keep=official["kept"]),
            subject.tokens(layout, channels=CHANNELS),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        yield {
            "strategy": official["strategy"],
            "n": tokens,
            "k": official["kept"],
            "ms": round(cost.ms, 3),
            "gram_ms": round(cost.gram_ms, 3),
            "grams": round(cost.grams, 4),
            "official_grams": official["grams"],
            "official_source": official["source"],
        }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    return (
        f"{row['strategy']:14} {row['n']:6} -> {row['k']:5} {row['ms']:10.2f} ms "
        f"{row['grams']:8.3f} Gram, official {row['official_grams']:7.3f} "
        f"({row['grams'] / row['official_grams']:.2f})"
    )


def main() -> None:
    names = sorted({each["strategy"] for each in TIMINGS})
    sizes = sorted({prod(each["grid"]) for each in TIMINGS})
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, choices=sizes, default=sizes)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="of each row, at most")
    parser.add_argument("--seconds", type=float, default=6.0, help="after which no round begins")
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    done = []
    for row in rows(arguments):
        done.append(row)
        print(line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({**machine(arguments.threads), "rows": done}, indent=1))


if __name__ == "__main__":
    main()
