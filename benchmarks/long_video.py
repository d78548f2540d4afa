"""Reducing long clips 16 times: time, memory and agreement with the exact algorithm.

    python benchmarks/long_video.py --json > benchmarks/results/long_video_cpu.json

Features of 1024 channels with realistic temporal redundancy (benchmarks/synthetic_clip.py) are
written to a file once, and read by a child process for each row, so that its peak memory is its
own:

- a batch row holds the features in memory; ``extra_bytes`` is what its peak grows beyond them;
- a stream row reads them from the file frame by frame; ``extra_bytes`` is the growth of its peak.

``seconds`` is processor time of the child on one thread, which other programs on the machine
disturb less than the wall clock does (``wall_seconds``). ``overlap_with_exact`` is the share of the
tokens kept by the same strategy with exact search that a row keeps too; at sizes where exact search
was not asked for (``--exact``) it is null. A strategy that refuses a size, or runs out of its time,
says so in ``refused``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic_clip import SyntheticClip
from torch import Tensor

import tokenreduce as tr

SIZES = (65_536, 262_144, 1_048_576)
SIDE = 16
FRAME = SIDE * SIDE
RIVALS = (
    "divprune", "tome", "prumerge", "framefusion", "dycoke", "fastvid", "prunevid", "flashvid",
    "holitom", "sttm", "scissor", "evs", "vidcom2", "norm-topk", "uniform", "random",
)  # fmt: skip


def write_features(path: Path, count: int, channels: int) -> None:
    """A clip of whole frames."""
    with path.open("wb") as file:
        for frame in SyntheticClip(count // FRAME, side=SIDE, channels=channels):
            file.write(frame.numpy().tobytes())


def layout(count: int) -> tr.Layout:
    return tr.Layout.from_grid((count // FRAME, SIDE, SIDE))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(file: Any, count: int, channels: int) -> Tensor:
    features = torch.empty(count, channels)
    view = memoryview(features.numpy()).cast("B")
    done = 0
    while done < len(view):
        done += file.readinto(view[done:])
    return features


def reduce_file(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    count, channels = options.n[0], options.channels
    budget = count // options.reduction
    settings = json.loads(options.settings)
    reducer = tr.create_strategy(options.strategy, **settings)
    small = tr.VisualTokens(torch.randn(1, FRAME * 30, 64), layout(FRAME * 30))
    reducer.with_budget(keep=FRAME)(small)
    if options.mode == "stream":
        before, started, wall = peak_bytes(), time.process_time(), time.perf_counter()
        stream = reducer.stream(budget=budget, window=options.window)
        with options.file.open("rb", buffering=0) as file:
            for _ in range(count // FRAME):
                stream.feed(read(file, FRAME, channels), (SIDE, SIDE))
        positions = stream.positions()
        kept = len(positions)
    else:
        with options.file.open("rb", buffering=0) as file:
            features = read(file, count, channels)
        tokens = tr.VisualTokens(features[None], layout(count))
        before, started, wall = peak_bytes(), time.process_time(), time.perf_counter()
        reduction = reducer.with_budget(keep=budget)(tokens)
        positions, kept = reduction.positions[0], reduction.kept
    row = {
        "n": count,
        "kept": kept,
        "seconds": round(time.process_time() - started, 3),
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "extra_bytes": peak_bytes() - before,
        "feature_bytes": count * channels * 4,
    }
    np.save(options.kept, positions.numpy())
    return row


def child(options: argparse.Namespace, file: Path, count: int, spec: dict[str, Any]) -> Any:
    """Run one row in a child process."""
    kept = file.with_name(f"{spec['name']}.npy".replace("/", "-"))
    command = [sys.executable, __file__, "--child", "--json", "--n", str(count)]
    command += ["--file", str(file), "--kept", str(kept), "--strategy", spec["strategy"]]
    command += ["--mode", spec.get("mode", "batch")]
    command += ["--window", str(options.window)] if options.window else []
    command += ["--settings", json.dumps(spec.get("settings", {}))]
    command += ["--channels", str(options.channels), "--reduction", str(options.reduction)]
    row = {"n": count, "strategy": spec["strategy"], "mode": spec.get("mode", "batch")}
    row["backend"] = spec.get("backend", "-")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {**row, "refused": f"took more than {options.timeout} s"}, None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"killed, exit status {done.returncode}"]
        return {**row, "refused": lines[-1][:300]}, None
    return {**row, **json.loads(done.stdout)}, np.load(kept)


def specs(options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """What is measured at a size; the exact algorithm comes first."""
    lftr: list[dict[str, Any]] = []
    if count <= options.exact:
        lftr.append({"name": "torch", "backend": "torch", "settings": {"neighbors": "torch"}})
    lftr += [
        {"name": name, "backend": name, "settings": {"neighbors": name}}
        for name in options.backends
    ]
    lftr.append({"name": "stream", "mode": "stream", "backend": "auto"})
    rows = [{"strategy": "lftr", **spec} for spec in lftr]
    return rows + [{"name": name, "strategy": name} for name in options.rivals]


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.n:
            file = Path(folder) / f"{count}.f32"
            write_features(file, count, options.channels)
            exact = None
            for spec in specs(options, count):
                row, kept = child(options, file, count, spec)
                if kept is not None and spec["name"] == "torch":
                    exact = set(kept.tolist())
                if kept is not None:
                    comparable = exact is not None and row["strategy"] == "lftr"
                    shared = len(exact & set(kept.tolist())) / len(exact) if comparable else None
                    row["overlap_with_exact"] = shared
                rows.append(row)
                if not options.json:
                    print(describe(row), flush=True)
                elif options.progress:
                    print(describe(row), file=sys.stderr, flush=True)
            file.unlink()
    return {
        "rows": rows,
        "channels": options.channels,
        "reduction": options.reduction,
        "window": options.window,
        "threads": 1,
        "device": f"{platform.machine()} CPU",
        "versions": {
            "tokenreduce": tr.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def describe(row: dict[str, Any]) -> str:
    head = f"{row['n']:>9,} {row['strategy']:12} {row['mode']:6} {row['backend']:10}"
    if "refused" in row:
        return f"{head} refused: {row['refused'][:90]}"
    overlap = row.get("overlap_with_exact")
    return (
        f"{head} {row['kept']:>6,} kept {row['seconds']:8.1f} s "
        f"{1e6 * row['seconds'] / row['n']:6.1f} us a token, extra "
        f"{row['extra_bytes'] / row['feature_bytes']:6.1%} of the features"
        + (f", overlap {overlap:.4f}" if overlap is not None else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=list(SIZES), help="tokens")
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--reduction", type=int, default=16)
    parser.add_argument("--window", type=int, help="tokens of a stream's window")
    parser.add_argument("--exact", type=int, default=262_144, help="largest n for exact search")
    parser.add_argument("--backends", nargs="*", default=["faiss-ivf"])
    parser.add_argument("--rivals", nargs="*", default=[], help="other strategies, or 'all'")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for a row")
    parser.add_argument("--folder", help="where the features are written (4 GB at 1 Mi tokens)")
    parser.add_argument("--progress", action="store_true", help="print rows to stderr as they come")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    for hidden in ("--file", "--kept"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    for hidden in ("--strategy", "--mode", "--settings"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(reduce_file(options)))
        return
    if any(count % FRAME for count in options.n):
        parser.error(f"--n counts whole frames of {FRAME} tokens")
    if options.rivals == ["all"]:
        options.rivals = list(RIVALS)
    result = run(options)
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
