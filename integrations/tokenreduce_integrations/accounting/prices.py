"""What tokens cost in the layers of a live model, for budgets that state a cost."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from tokenreduce.stage import Price, Stage
from tokenreduce_integrations.accounting.curves import Layer, language_model_cost
from tokenreduce_integrations.transformers.families import find_decoder

#: Token counts at which prefill is timed, and how often.
_PROBES = (1, 32, 64, 128, 256, 512, 1024, 2048)
_ROUNDS = 5


def priced(model: nn.Module, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages with the prices that their budgets ask for; the others as they are."""
    made: dict[str, Price] = {}

    def price(stage: Stage) -> Price | None:
        if stage.flops is not None:
            return made.setdefault("flops", FlopPrice(language_model_cost(model).layers))
        if stage.prefill_ms is not None:
            if "prefill_ms" not in made:
                made["prefill_ms"] = time_prefill(model)
            return made["prefill_ms"]
        return None

    return tuple(
        stage if (found := price(stage)) is None else replace(stage, price=found)
        for stage in stages
    )


@dataclass(frozen=True)
class FlopPrice:
    """FLOPs of the layers of an LLM."""

    layers: tuple[Layer, ...]

    def __call__(self, tokens: int, first: int, last: int | None) -> float:
        return sum(layer.prefill(tokens) for layer in self.layers[first:last])


@dataclass(frozen=True)
class TimePrice:
    """Milliseconds of the layers of an LLM, interpolated between what was measured.

    Attributes:
        tokens: ascending counts.
        milliseconds: of all layers together at each of them, never falling.
        layers: how many there are; they share the time evenly.
    """

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    layers: int

    def __call__(self, tokens: int, first: int, last: int | None) -> float:
        share = ((self.layers if last is None else last) - first) / self.layers
        if tokens == 0:
            return 0.0
        right = min(max(bisect_right(self.tokens, tokens), 1), len(self.tokens) - 1)
        low, high = self.tokens[right - 1], self.tokens[right]
        at_low, at_high = self.milliseconds[right - 1], self.milliseconds[right]
        whole = at_low + (tokens - low) * (at_high - at_low) / (high - low)
        return share * whole


@torch.no_grad()
def time_prefill(model: nn.Module) -> TimePrice:
    """Time the LLM of a model on prompts of several lengths, on its device, in turn.

    Medians over rounds; where a longer prompt was faster, the longer time of the shorter one holds.
    """
    decoder = find_decoder(model)
    parameter = next(decoder.parameters())
    most = getattr(decoder.config, "max_position_embeddings", _PROBES[-1])
    probes = tuple(n for n in _PROBES if n <= most)
    embeddings = decoder.get_input_embeddings()
    dtype = embeddings.weight.dtype
    width = decoder.config.hidden_size
    rounds: dict[int, list[float]] = {probe: [] for probe in probes}
    for number in range(_ROUNDS + 1):
        for probe in probes:
            embeds = torch.zeros(1, probe, width, device=parameter.device, dtype=dtype)
            started = _now(parameter.device)
            decoder(inputs_embeds=embeds, use_cache=True)
            if number:
                rounds[probe].append((_now(parameter.device) - started) * 1000)
    medians = [statistics.median(rounds[probe]) for probe in probes]
    return TimePrice(probes, tuple(accumulate(medians, max)), len(decoder.layers))


def _now(device: Any) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
