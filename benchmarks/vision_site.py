"""Merging inside an encoder: its blocks against the same blocks on shorter sequences.

ToMe merges r tokens after each block of a timm vision transformer with random weights (ViT-L/16 at
r=8 by default: 196 patches become 4). Three encodings are timed in turn, round after round:

- full: the unmodified model;
- attached: the model with the stage attached; matching and merging are counted apart;
- ideal: the unmodified blocks on sequences cut to the same number of tokens, block by block.

Figures are medians over rounds of the ratio within a round. Weights are random, so nothing is said
about accuracy.

    python benchmarks/vision_site.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch

import tokenreduce as tr


def measure(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of a call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def ideal_call(model: Any, pixels: torch.Tensor, counts: list[int]) -> Callable[[], Any]:
    """The unmodified modules on sequences of ``counts[i]`` tokens in block i."""

    def call() -> Any:
        hidden = model.norm_pre(model._pos_embed(model.patch_embed(pixels)))
        for block, count in zip(model.blocks, counts, strict=True):
            hidden = block(hidden[:, :count])
        return model.forward_head(model.norm(hidden))

    return call


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    model: Any = timm.create_model(options.model, num_classes=1000)
    model = model.to(device=device, dtype=dtype).eval()
    size = model.patch_embed.img_size
    pixels = torch.randn(options.batch, 3, *size, device=device, dtype=dtype)
    patches, prefix, depth = (
        model.patch_embed.num_patches,
        model.num_prefix_tokens,
        len(model.blocks),
    )
    keep = patches - options.r * depth
    if keep < 1:
        raise SystemExit(f"r={options.r} over {depth} blocks leaves none of {patches} patches.")
    counts = [prefix + patches - options.r * block for block in range(depth)]
    ideal = ideal_call(model, pixels, counts)
    stage = tr.Stage(reducer=tr.create_strategy(options.strategy, keep=keep), site="vision")

    seen: list[int] = []
    rows = []
    with torch.inference_mode():
        for number in range(options.rounds + options.warmup):
            with tr.attach(model, stage) as attachment:
                if number == 0:
                    handles = [
                        block.attn.register_forward_pre_hook(
                            lambda _, a: seen.append(a[0].shape[1])
                        )
                        for block in model.blocks
                    ]
                attached = measure(lambda: model(pixels), device)
                matching = attachment.receipt.selection_ms
                if number == 0:
                    for handle in handles:
                        handle.remove()
            rows.append(
                (attached, matching, measure(ideal, device), measure(lambda: model(pixels), device))
            )
    if seen != counts:
        raise SystemExit(f"blocks saw {seen} tokens, not {counts}.")
    rows = rows[options.warmup :]
    return {
        "attached_over_ideal": statistics.median((a - m) / i for a, m, i, _ in rows),
        "attached_over_ideal_with_matching": statistics.median(a / i for a, _, i, _ in rows),
        "speedup": statistics.median(f / a for a, _, _, f in rows),
        "speedup_without_matching": statistics.median(f / (a - m) for a, m, _, f in rows),
        "attached_ms": statistics.median(a for a, *_ in rows),
        "matching_ms": statistics.median(m for _, m, *_ in rows),
        "ideal_ms": statistics.median(i for _, _, i, _ in rows),
        "full_ms": statistics.median(f for *_, f in rows),
        "rounds": len(rows),
        "model": options.model,
        "strategy": options.strategy,
        "r": options.r,
        "tokens_per_block": counts,
        "batch": options.batch,
        "dtype": options.dtype,
        "threads": options.threads,
        "device": device_name(device),
        "versions": {
            "tokenreduce": tr.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="vit_large_patch16_224", help="of timm")
    parser.add_argument("--strategy", default="tome")
    parser.add_argument("--r", type=int, default=8, help="tokens that disappear in each block")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    result = run(options)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")


if __name__ == "__main__":
    main()
