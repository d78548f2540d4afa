"""What vLLM's vision towers tell of visual tokens: attention, queries, keys and features.

Queries and keys are caught where a layer hands them to its attention kernel, by hooks on the
modules of one model, and signals are computed of them: the kernel stays what it is. Under tensor
parallelism a worker holds some of the heads; their sums are reduced over the workers, so that all
of them choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import MissingSignal, UnsupportedModel
from tokenreduce_integrations.transformers.probes.attention import SIGNALS
from tokenreduce_integrations.transformers.probes.towers import SHALLOW
from tokenreduce_integrations.vllm.families import ENCODED, Family, packed_grids
from tokenreduce_integrations.vllm.items import ServedItem

_MEANS_OVER_HEADS = frozenset({"class_attention", "shallow_class_attention", "received_attention"})


class TowerSignals:
    """Hooks on the vision tower of one model.

    Args:
        model: of vLLM.
        family: of the model.
    """

    def __init__(self, model: Any, family: Family) -> None:
        self._model = model
        self._family = family
        self._wanted: frozenset[str] = frozenset()
        self._caught: dict[str, list[Tensor]] = {}
        self._segments: list[int] = []
        tower = family.tower
        layers = model.get_submodule(tower.layers)
        shallow = frozenset({"shallow_class_attention"})
        deep = tower.deep(model.config)
        places = {deep if deep >= 0 else len(layers) + deep: frozenset(SIGNALS) - shallow}
        if not tower.native:
            first = max(0, model.config.vision_config.num_hidden_layers // SHALLOW - 1)
            places[first] = places.get(first, frozenset()) | shallow
        for index, names in places.items():
            attention, kernel = _attention(layers[index])
            kernel.register_forward_pre_hook(self._catch(attention, names), with_kwargs=True)
        projector = model.get_submodule(tower.projector)
        projector.register_forward_pre_hook(self._catch_features)

    @contextmanager
    def catching(self, names: Collection[str], arguments: Mapping[str, Any]) -> Iterator[None]:
        """Catch some signals of the encoding call inside, for :meth:`read`.

        Args:
            names: of the signals.
            arguments: of the call.

        Raises:
            MissingSignal: if the call does not give one of them.
        """
        self._wanted, self._caught = ENCODED.intersection(names), {}
        self._segments = _frame_patches(arguments) if self._family.tower.native else []
        try:
            yield
            missing = self._wanted - set(self._caught)
            if missing:
                raise MissingSignal(
                    f"the vision tower of {self._family.architecture} ran without the modules that "
                    f"{', '.join(sorted(missing))} is read from: it was replaced or compiled."
                )
        finally:
            self._wanted = frozenset()

    def read(
        self, items: Sequence[ServedItem], arguments: Mapping[str, Any]
    ) -> dict[str, list[Tensor]]:
        """The signals that were caught, ``(N, ...)`` of each item.

        Args:
            items: those that were encoded.
            arguments: what their encoding was called with.

        Raises:
            MissingSignal: if the tower gave other tokens than the items have.
        """
        caught, self._caught = self._caught, {}
        found = {}
        for name, parts in caught.items():
            pooled = self._pooled(name, parts, items, arguments)
            if [len(part) for part in pooled] != [len(item.shape) for item in items]:
                raise MissingSignal(
                    f"{name!r} of {[len(part) for part in pooled]} tokens, but items of "
                    f"{[len(item.shape) for item in items]}: the vision tower of "
                    f"{self._family.architecture} did not see all that came out of it."
                )
            found[name] = pooled
        return found

    def _pooled(
        self,
        name: str,
        parts: Sequence[Tensor],
        items: Sequence[ServedItem],
        arguments: Mapping[str, Any],
    ) -> list[Tensor]:
        """A signal at the granularity of the LLM's tokens."""
        tower = self._family.tower
        signal = torch.cat(list(parts), dim=1 if tower.native else 0)
        shapes = [item.shape for item in items]
        if name == "vision_features" and tower.concatenated(self._model.config) > 1:
            tiles = signal.unflatten(-1, (tower.concatenated(self._model.config), -1)).mean(-2)
            per_item = tiles.split([len(shape.blocks) for shape in shapes])
            return [each.flatten(0, 1) for each in per_item]
        if signal.ndim == 3:
            return tower.pool(self._model, signal, shapes, arguments)
        pooled = tower.pool(self._model, signal[..., None], shapes, arguments)
        return [each[:, 0] for each in pooled]

    def _catch_features(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if "vision_features" in self._wanted:
            states = args[0]
            if self._family.tower.native:
                states = states.reshape(1, -1, states.shape[-1])
            self._caught.setdefault("vision_features", []).append(states)

    def _catch(self, attention: Any, given: frozenset[str]) -> Any:
        def hook(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = self._wanted & given
            if not names:
                return
            query, key = (
                _heads(kwargs[name] if name in kwargs else args[place], kernel)
                for place, name in enumerate(("query", "key"))
            )
            parts = self._segments or [query.shape[2]]
            for queries, keys in zip(query.split(parts, 2), key.split(parts, 2), strict=True):
                for name in sorted(names):
                    self._caught.setdefault(name, []).append(
                        _over_all_heads(name, queries, keys, attention, kernel)
                    )

        return hook


def _frame_patches(arguments: Mapping[str, Any]) -> list[int]:
    """Patches of each picture and frame: what attends to itself."""
    grids = packed_grids(arguments)
    return [rows * columns for frames, rows, columns in grids for _ in range(frames)]


def _attention(layer: nn.Module) -> tuple[Any, Any]:
    """The attention of a layer, and the kernel that it calls.

    Raises:
        UnsupportedModel: if it has none, or several.
    """
    found = [
        (module, module.attn)
        for module in layer.modules()
        if hasattr(getattr(module, "attn", None), "head_size")
    ]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(layer).__name__} attends in {len(found)} places; signals are read of one."
        )
    return found[0]


def _heads(states: Tensor, kernel: Any) -> Tensor:
    """``(B, H, S, D)`` of ``(B, S, H * D)`` or ``(B, S, H, D)``."""
    if states.ndim == 3:
        states = states.unflatten(-1, (kernel.num_heads, kernel.head_size))
    return states.transpose(1, 2)


def _over_all_heads(name: str, query: Tensor, key: Tensor, attention: Any, kernel: Any) -> Tensor:
    """A signal of all heads, of which this worker has some.

    Towers may be padded with heads that say nothing, which come last.
    """
    workers = getattr(attention, "tp_size", 1)
    heads = getattr(attention, "num_heads", kernel.num_heads * workers)
    if workers == 1:
        return SIGNALS[name](query[:, :heads], key[:, :heads], kernel.scale)
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        tensor_model_parallel_all_gather,
        tensor_model_parallel_all_reduce,
    )

    own = min(max(0, heads - get_tensor_model_parallel_rank() * kernel.num_heads), query.shape[1])
    if name in _MEANS_OVER_HEADS:
        batch, _, length, _ = query.shape
        total = torch.zeros(batch, length, device=query.device)
        if own:
            total = SIGNALS[name](query[:, :own], key[:, :own], kernel.scale) * own
        reduced: Tensor = tensor_model_parallel_all_reduce(total.contiguous()) / heads
        return reduced
    part = SIGNALS[name](query, key, kernel.scale)
    gathered: Tensor = tensor_model_parallel_all_gather(part.contiguous(), dim=-1)
    return gathered[..., : heads * kernel.head_size]
