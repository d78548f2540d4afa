"""What each strategy costs, against the Gram matrix and one pass over the features.

Clips of 576 (4 x 12 x 12), 2304 (16 x 12 x 12), 6272 (32 x 14 x 14) and 23,328 (32 x 27 x 27)
tokens of 1024 channels, of which an eighth is kept. One thread, float32. Every row holds its own
anchors: in each round one product of the features with themselves (``gram_ms``, that of one item
times the batch), one pass over them (``read_ms``) and the strategy (``ms``) run in turn, and the
row gives the shortest of each, in time of the processor, which load of the machine disturbs least.
``peak_bytes`` is what a child process grew by in one call. A call that takes longer than
``--seconds`` is timed once and has no peak; a row whose call would take longer than ``--longest``,
judged by the same item alone, says so and is left out.

Wrappers cost what they wrap, and strategies that need trained weights are left out. Where a
strategy refuses a size, the row says why.

    python benchmarks/strategies.py --only divprune scope --n 576 2304 --json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import tokenreduce as tr
from tokenreduce.capabilities import COST_LIMIT
from tokenreduce.errors import TokenReduceError
from tokenreduce.plugins import installed
from tokenreduce.testing import Subject
from tokenreduce.testing.cost import measure_cost, one_thread
from tokenreduce.tokens import Layout

GRIDS = {576: (4, 12, 12), 2304: (16, 12, 12), 6272: (32, 14, 14), 23328: (32, 27, 27)}
CHANNELS = 1024


def runnable() -> list[str]:
    """The strategies that run by themselves."""
    records = installed().strategies.values()
    return [r.name for r in records if not r.wraps and not r.needs_weights]


def measure(name: str, n: int, batch: int, *, rounds: int, seconds: float) -> dict[str, Any]:
    """One row.

    Args:
        name: of the strategy.
        n: tokens of each item, one of :data:`GRIDS`.
        batch: items.
        rounds: at most.
        seconds: no further round begins after so long.
    """
    subject = Subject.of(name)
    k = n // 8
    row: dict[str, Any] = {"strategy": name, "n": n, "d": CHANNELS, "k": k, "batch": batch}
    tokens = subject.tokens(Layout.from_grid(GRIDS[n]), batch=batch, channels=CHANNELS)
    try:
        reducer = subject.create(keep=k)
        with one_thread():
            cost = measure_cost(
                reducer, tokens, rounds=rounds, seconds=seconds, clock=time.process_time
            )
    except TokenReduceError as error:
        return {**row, "refused": f"{type(error).__name__}: {error}"}
    return {
        **row,
        "ms": round(cost.ms, 3),
        "gram_ms": round(cost.gram_ms, 3),
        "read_ms": round(cost.read_ms, 4),
        "peak_bytes": cost.peak_bytes,
    }


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows asked for, size by size."""
    each: dict[tuple[str, int], float] = {}
    for n in arguments.n:
        for batch in arguments.batch:
            for name in arguments.only:
                expected = batch * each.get((name, n), 0.0) / 1000
                if expected > arguments.longest:
                    row = {"strategy": name, "n": n, "d": CHANNELS, "k": n // 8, "batch": batch}
                    yield {**row, "left_out": f"a call would take about {expected:.0f} s"}
                    continue
                row = measure(name, n, batch, rounds=arguments.rounds, seconds=arguments.seconds)
                each.setdefault((name, n), row.get("ms", 0.0) / batch)
                yield row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['strategy']:22} {row['n']:6} x {row['batch']}"
    for reason in ("refused", "left_out"):
        if reason in row:
            return f"{head}  {reason.replace('_', ' ')}: {row[reason]}"
    limit = COST_LIMIT.get(installed().strategies[row["strategy"]].cost)
    peak = row["peak_bytes"]
    matrices = "" if peak is None else f"  {peak / (4 * row['n'] ** 2 * row['batch']):6.2f} N x N"
    return (
        f"{head} {row['ms']:10.2f} ms {row['ms'] / row['gram_ms']:7.3f} Gram "
        f"{row['ms'] / row['read_ms']:8.1f} reads{matrices}"
        + ("" if limit is None else f"  (class: {limit:g} Gram)")
    )


def machine(threads: int = 1) -> dict[str, Any]:
    """What the rows were measured on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{_processor()}, CPU, {threads} thread{'s' * (threads > 1)}, float32",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenreduce": tr.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = [text.partition(":")[2].strip() for text in file if "model name" in text]
    except OSError:
        found = []
    return found[0] if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=runnable())
    parser.add_argument("--n", nargs="+", type=int, choices=tuple(GRIDS), default=list(GRIDS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7, help="of each row, at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="after which no round begins")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds that a call may take")
    parser.add_argument("--json", action="store_true", help="print one JSON document at the end")
    arguments = parser.parse_args()
    done = []
    for row in rows(arguments):
        done.append(row)
        print(line(row), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(json.dumps({**machine(), "rows": done}, indent=1))


if __name__ == "__main__":
    main()
