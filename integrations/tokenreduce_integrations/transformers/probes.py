"""Reading signals of a vision tower while it encodes, without eager attention.

Attention rows are recomputed from the queries and keys of the one layer that is wanted, so the
tower keeps its fast attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Probe(Protocol):
    """Hooks on the modules that own visual features, and the signals that they caught."""

    @classmethod
    def offers(cls, owner: Any) -> frozenset[str]:
        """Names of the signals that can be read from this model."""
        ...

    def __init__(self, owner: Any, wanted: Collection[str]) -> None: ...

    def read(self, modality: str, features: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Signals ``(N, ...)`` of each item of the latest encoding call, as its features."""
        ...

    def detach(self) -> None:
        """Remove the hooks."""
        ...


class PatchTowerProbe:
    """A CLIP-like tower whose patches reach the projector one by one (LLaVA).

    Attention, queries and keys are those of the layer whose output the projector reads; attention
    is averaged over heads.
    """

    _ATTENTION = frozenset({"class_attention", "received_attention", "queries", "keys"})

    @classmethod
    def offers(cls, owner: Any) -> frozenset[str]:
        names = {"vision_features"}
        if _feature_layer(owner) is not None:
            names |= cls._ATTENTION
            if not hasattr(owner.vision_tower.embeddings, "class_embedding"):
                names.remove("class_attention")
        return frozenset(names)

    def __init__(self, owner: Any, wanted: Collection[str]) -> None:
        self._wanted = frozenset(wanted)
        self._caught: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._heads = 1
        self._scale = 1.0
        projector: nn.Module = owner.multi_modal_projector
        if "vision_features" in self._wanted:
            self._handles.append(projector.register_forward_pre_hook(self._catch_input))
        if self._wanted & self._ATTENTION:
            attention: Any = _feature_layer(owner)
            self._heads, self._scale = attention.num_heads, attention.scale
            for name in ("q", "k"):
                linear: nn.Module = getattr(attention, f"{name}_proj")
                self._handles.append(linear.register_forward_hook(self._catch(name)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._caught = {}

    def read(self, modality: str, features: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        whole = {name: self._signal(name) for name in self._wanted}
        self._caught = {}
        # A class token that the projector was not given comes first in the tower's sequence.
        return [
            {name: signal[i, signal.shape[1] - len(feature) :] for name, signal in whole.items()}
            for i, feature in enumerate(features)
        ]

    def _catch_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._caught["input"] = args[0].detach()

    def _catch(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._caught[name] = output.detach()

        return hook

    def _signal(self, name: str) -> Tensor:
        if name == "vision_features":
            return self._caught["input"]
        if name in ("queries", "keys"):
            return self._caught[name[0]]
        queries, keys = (
            self._caught[part].unflatten(-1, (self._heads, -1)).transpose(1, 2).float()
            for part in ("q", "k")
        )
        if name == "class_attention":
            row: Tensor = (queries[:, :, :1] @ keys.transpose(2, 3)) * self._scale
            return row.softmax(-1).mean(1)[:, 0]
        return _received(queries, keys, self._scale)


def _received(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """``(B, S)`` mean attention that each key receives, one head at a time to bound memory."""
    total = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
    for head in range(keys.shape[1]):
        weights = (queries[:, head] @ keys[:, head].transpose(1, 2)) * scale
        total += weights.softmax(-1).mean(1)
    return total / keys.shape[1]


def _feature_layer(owner: Any) -> Any | None:
    """The attention module of the layer whose output the projector reads; None if unknown."""
    layers = getattr(getattr(owner.vision_tower, "encoder", None), "layers", None)
    chosen = owner.config.vision_feature_layer
    index = chosen if isinstance(chosen, int) else chosen[-1]
    if layers is None or index == 0:
        return None
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of layer i - 1.
    layer = layers[index if index < 0 else index - 1]
    attention = getattr(layer, "self_attn", None)
    known = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "num_heads", "scale"))
    return attention if known else None
