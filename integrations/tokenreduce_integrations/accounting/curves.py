"""What the layers of an LLM cost by the number of tokens, from its configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from tokenreduce.errors import UnsupportedModel
from tokenreduce_integrations.accounting.flops import count_flops
from tokenreduce_integrations.accounting.parts import LLM, Part
from tokenreduce_integrations.transformers.families import find_decoder
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_by_layer

_PROBES = (64, 128, 192)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """FLOPs of one layer: ``linear * n + quadratic * n^2`` for a prompt of ``n`` tokens.

    The square stands for attention, counted as the full rectangle of queries and keys.
    """

    linear: int
    quadratic: int

    def prefill(self, tokens: int) -> int:
        """FLOPs of a prompt."""
        return self.linear * tokens + self.quadratic * tokens**2

    def decode(self, held: int) -> int:
        """FLOPs of one more token that attends to ``held`` tokens, itself included."""
        return self.linear + self.quadratic * held


@dataclass(frozen=True, kw_only=True)
class LanguageModelCost:
    """What an LLM costs by the number of tokens in each of its layers.

    Attributes:
        layers: one entry for each layer.
        head: FLOPs of the logits of one token.
        kv_bytes: bytes of keys and values of one token in each layer; None if they are not known.
    """

    layers: tuple[Layer, ...]
    head: int
    kv_bytes: tuple[int, ...] | None

    def prefill(self, tokens_per_layer: Sequence[int]) -> int:
        """FLOPs of a prompt with the given number of tokens in each layer, logits of one token."""
        pairs = zip(self.layers, tokens_per_layer, strict=True)
        return sum(layer.prefill(tokens) for layer, tokens in pairs) + self.head

    def decode(self, tokens_per_layer: Sequence[int]) -> int:
        """FLOPs of the next token."""
        pairs = zip(self.layers, tokens_per_layer, strict=True)
        return sum(layer.decode(tokens + 1) for layer, tokens in pairs) + self.head

    def cache(self, tokens_per_layer: Sequence[int]) -> int | None:
        """Bytes of keys and values; None if they are not known."""
        if self.kv_bytes is None:
            return None
        pairs = zip(tokens_per_layer, self.kv_bytes, strict=True)
        return sum(tokens * size for tokens, size in pairs)


def language_model_cost(model: nn.Module) -> LanguageModelCost:
    """The cost of a model's LLM, counted on a copy without weights (meta device).

    Args:
        model: with or without weights, quantized or not; it is not run.

    Raises:
        UnsupportedModel: if the work of a layer is no polynomial of degree two in the tokens, or
            its LLM does not run by itself.
    """
    decoder = find_decoder(model)
    bare = _without_weights(decoder)
    counts = [_count(bare, probe) for probe in _PROBES]
    layers = []
    for index in range(len(decoder.layers)):
        seen = [count[index] for count in counts]
        layer = _fit(seen)
        if any(layer.prefill(n) != flops for n, flops in zip(_PROBES, seen, strict=True)):
            raise UnsupportedModel(
                f"{type(decoder).__name__}: the work of layer {index} is no polynomial of degree "
                "two in the tokens, so that no token count can be solved for."
            )
        layers.append(layer)
    get_head: Any = model.get_output_embeddings
    head = get_head()
    width = 0 if head is None else 2 * head.in_features * head.out_features
    held = kv_bytes_by_layer(decoder)
    return LanguageModelCost(layers=tuple(layers), head=width, kv_bytes=held)


def _without_weights(decoder: Any) -> Any:
    config = copy.deepcopy(decoder.config)
    with torch.device("meta"):
        return type(decoder)(config).eval()


def _count(decoder: Any, tokens: int) -> dict[int, int]:
    width = decoder.config.hidden_size
    embeds = torch.empty(1, tokens, width, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    parts: dict[nn.Module, Part] = {layer: (LLM, i) for i, layer in enumerate(decoder.layers)}
    # With a cache, positions are not searched for the bounds of packed prompts.
    flops = count_flops(
        decoder,
        lambda: decoder(inputs_embeds=embeds, position_ids=positions, use_cache=True),
        parts,
    )
    return dict(flops.layers)


def _fit(seen: Sequence[int]) -> Layer:
    """The polynomial through the first two probes."""
    first, second = _PROBES[:2]
    slope = Fraction(seen[1], second) - Fraction(seen[0], first)
    quadratic = slope / (second - first)
    linear = Fraction(seen[0], first) - quadratic * first
    return Layer(linear=int(linear), quadratic=int(quadratic))
