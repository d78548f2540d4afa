"""Prefill speed: the attached decoder against the unmodified one fed the same shorter embeddings.

A LLaVA-like model with random weights (hidden 1024, 8 layers by default) reads 576 visual and 40
text tokens. Three decoder calls are timed in turn, round after round, on one thread:

- full: the unmodified decoder on the whole sequence;
- attached: the decoder with the attachment, hooks included, selection counted apart;
- ideal: the unmodified decoder fed the embeddings and positions that the attachment left.

Figures are medians over rounds of the ratio within a round. FLOPs are counted on what ran.

    python benchmarks/prefill.py --json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tokenreduce as tr

IMAGE_TOKEN = 3
SYNCING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


def build(hidden: int, layers: int, device: str, dtype: torch.dtype) -> Any:
    """A LLaVA-like model with random weights and 576 visual tokens."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": hidden * 11 // 4,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "pad_token_id": 0,
        },
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return model.to(device=device, dtype=dtype).eval()


class OpCounter(TorchDispatchMode):
    """Counts dispatched operators, and those that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = 0
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        self.syncs += func.overloadpacket.__name__ in SYNCING_OPS
        return func(*args, **(kwargs or {}))


class DecoderClock:
    """Times calls of the decoder, the hooks of an attachment included."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.seconds = 0.0
        self._started = 0.0
        self._before = decoder.register_forward_pre_hook(self._start, prepend=True)
        self._after: Any = None

    def _start(self, *_: Any) -> None:
        synchronize(self.decoder)
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        synchronize(self.decoder)
        self.seconds = time.perf_counter() - self._started

    def measure(self, call: Callable[[], Any]) -> float:
        """Milliseconds of the decoder in one call of the model."""
        self._after = self.decoder.register_forward_hook(self._stop)
        try:
            call()
        finally:
            self._after.remove()
        return self.seconds * 1000


def synchronize(module: Any) -> None:
    if next(module.parameters()).is_cuda:
        torch.cuda.synchronize()


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of what ran; CPU attention is not counted out of the box."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={attention: cpu_attention}) as counter:
        call()
    return int(counter.get_total_flops())


def count_ops(call: Callable[[], Any]) -> OpCounter:
    with OpCounter() as counter:
        call()
    return counter


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = build(options.hidden, options.layers, options.device, dtype)
    decoder = model.model.language_model
    visual, text = 576, 40
    ids = torch.randint(10, 500, (1, 1 + visual + text - 1), device=options.device)
    ids[:, 1 : 1 + visual] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 336, 336, device=options.device, dtype=dtype)
    with torch.no_grad():
        encoded = {"image": model.model.get_image_features(pixels, return_dict=True)}

    def prefill() -> Any:
        with torch.no_grad():
            return model.model(input_ids=ids, mm_encoder_outputs=dict(encoded), use_cache=True)

    reducer = tr.create_strategy(options.strategy, keep=options.keep)
    seen: dict[str, Any] = {}

    def remember(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    with tr.attach(model, reducer) as attachment:
        handle = decoder.register_forward_pre_hook(remember, with_kwargs=True)
        prefill()
        handle.remove()
        kept = attachment.receipt.tokens_out
        reduced_flops = count_flops(prefill)
    embeds, positions = seen["inputs_embeds"].clone(), seen["position_ids"].clone()

    def ideal() -> Any:
        cache = transformers.DynamicCache(config=decoder.config)
        with torch.no_grad():
            return decoder(
                inputs_embeds=embeds,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )

    rows = []
    for _ in range(options.rounds + 2):
        with tr.attach(model, reducer) as attachment:
            attached_clock = DecoderClock(decoder)
            attached = attached_clock.measure(prefill)
            attached_clock._before.remove()
            selection = attachment.receipt.selection_ms
        clock = DecoderClock(decoder)
        rows.append((attached, selection, clock.measure(ideal), clock.measure(prefill)))
        clock._before.remove()
    rows = rows[2:]

    plain = count_ops(prefill)
    with tr.attach(model, tr.create_strategy(options.strategy, keep_ratio=1.0)):
        prefill()
        keep_all = count_ops(prefill)
    return {
        "attached_over_ideal": statistics.median((a - s) / i for a, s, i, _ in rows),
        "speedup": statistics.median(f / a for a, _, _, f in rows),
        "speedup_without_selection": statistics.median(f / (a - s) for a, s, _, f in rows),
        "flops_ratio": count_flops(prefill) / reduced_flops,
        "keep_all_added_ops": keep_all.ops - plain.ops,
        "keep_all_added_syncs": keep_all.syncs - plain.syncs,
        "attached_ms": statistics.median(a for a, *_ in rows),
        "selection_ms": statistics.median(s for _, s, *_ in rows),
        "ideal_ms": statistics.median(i for _, _, i, _ in rows),
        "full_ms": statistics.median(f for *_, f in rows),
        "rounds": len(rows),
        "strategy": options.strategy,
        "visual_tokens": [visual, kept],
        "text_tokens": text,
        "hidden": options.hidden,
        "layers": options.layers,
        "dtype": options.dtype,
        "threads": options.threads,
        "device": device_name(options.device),
        "versions": {
            "tokenreduce": tr.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strategy", default="lftr")
    parser.add_argument("--keep", type=int, default=36, help="visual tokens to keep of 576")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
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
        print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")


if __name__ == "__main__":
    main()
