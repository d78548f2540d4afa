"""Search for the most similar earlier token: time and recall of each backend.

    python benchmarks/neighbors.py --json > benchmarks/results/neighbors_cpu.json

Tokens of 1024 channels are what LFTR's temporal step leaves of synthetic clips. ``seconds`` is
processor time on one thread. ``recall`` is the share of tokens for which a backend finds an earlier
token as similar (within 1e-5) as the exact search does; ``regret`` is the mean of how much less
similar it is, as a cosine. ``crossover`` is the least number of tokens from which on a backend is
faster than exact search at every size measured; ``auto`` counts keys, half as many.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from typing import Any

import torch
from synthetic_clip import SyntheticClip
from torch import Tensor

import tokenreduce as tr
from tokenreduce.neighbors import nearest_earlier
from tokenreduce.ops.tracks import mean_direction, track_cosine, tracks

BACKENDS = ("torch", "faiss-flat", "faiss-ivf", "faiss-hnsw")


def survivors(count: int, channels: int, device: str) -> Tensor:
    """``(count, channels)`` tokens that do not repeat their own place in the frame before."""
    found: list[Tensor] = []
    total, seed = 0, 0
    while total < count:
        clip = torch.cat(list(SyntheticClip(64, channels=channels, seed=seed)))
        order, linked = tracks(tr.Layout.from_grid((64, 16, 16)))
        spread = 1 - mean_direction(clip, torch.ones(1, len(clip))).square().sum()
        new = clip[track_cosine(clip, order, linked) < 1 - 0.25 * spread]
        found.append(new)
        total, seed = total + len(new), seed + 1
    return torch.cat(found)[:count].to(device)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = []
    everyone = survivors(max(options.n), options.channels, options.device)
    for count in options.n:
        features, index = everyone[:count], torch.arange(count, device=options.device)
        exact = None
        for backend in options.backends:
            nearest_earlier(features[:1024], index[:1024], backend=backend)
            started = clock(options.device)
            value, _ = nearest_earlier(features, index, backend=backend)
            seconds = clock(options.device) - started
            exact = value if exact is None else exact
            short = (exact - value)[1:]
            rows.append(
                {
                    "n": count,
                    "backend": backend,
                    "seconds": round(seconds, 4),
                    "recall": round(float((short <= 1e-5).float().mean()), 4),
                    "regret": round(float(short.clamp(min=0).mean()), 6),
                }
            )
            if not options.json:
                print(rows[-1], flush=True)
    return {
        "rows": rows,
        "crossover": {name: crossover(rows, name) for name in options.backends[1:]},
        "channels": options.channels,
        "threads": 1,
        "device": device_name(options.device),
        "versions": {"tokenreduce": tr.__version__, "torch": torch.__version__},
    }


def crossover(rows: list[dict[str, Any]], backend: str) -> int | None:
    seconds = {(row["n"], row["backend"]): row["seconds"] for row in rows}
    sizes = sorted({row["n"] for row in rows})
    wins = [seconds[n, backend] < seconds[n, "torch"] for n in sizes]
    return next((n for i, n in enumerate(sizes) if all(wins[i:])), None)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else f"{platform.machine()} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="torch comes first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    result = run(options)
    print(json.dumps(result, indent=1)) if options.json else print(result["crossover"])


if __name__ == "__main__":
    main()
