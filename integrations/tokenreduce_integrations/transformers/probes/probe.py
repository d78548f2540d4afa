"""Probes: what is put on a model to read signals of its vision tower."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenreduce.errors import AttachmentError, MissingSignal
from tokenreduce_integrations.transformers.hooks import Uncopyable, outside_compilation
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.observed_attention import (
    Callback,
    NormObservation,
    Observation,
    observe,
)
from tokenreduce_integrations.transformers.probes.attention import SIGNALS, segments
from tokenreduce_integrations.transformers.probes.pools import Pool
from tokenreduce_integrations.transformers.probes.towers import Tower

#: Signals made of what the projector reads.
_FEATURES = frozenset({"vision_features", "joint_image_embeddings"})


class Probe(Protocol):
    """Hooks on a model that catch signals while it encodes."""

    def begin(self) -> None:
        """Forget what was caught; an encoding call begins in this thread."""
        ...

    def read(
        self, modality: str, features: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[dict[str, Tensor]]:
        """Signals ``(N, ...)`` of each item of the encoding call that ended.

        Args:
            modality: ``"image"`` or ``"video"``.
            features: ``(N, D)`` of each item.
            arguments: those of the encoding call.
        """
        ...

    def detach(self) -> None:
        """Remove the hooks."""
        ...


class ProbeFactory(Protocol):
    """What signals the models of a family give, and the probe that reads them."""

    def offers(self, owner: Any) -> frozenset[str]:
        """Names of the signals that can be read from a model by itself."""
        ...

    def joint_tower(self, owner: Any) -> Any | None:
        """The tower's configuration if its patches have embeddings in a joint space; else None."""
        ...

    def __call__(self, owner: Any, wanted: Collection[str], joint: JointEncoder | None) -> Probe:
        """Put a probe on a model."""
        ...


@dataclass(frozen=True, kw_only=True)
class TowerProbes:
    """Probes of models that have one vision tower and one projector.

    Attributes:
        tower: finds the tower in the module that owns visual features.
        pools: for each modality, from the tower's patches to the LLM's tokens.
    """

    tower: Callable[[Any], Tower]
    pools: Mapping[str, Pool]

    def offers(self, owner: Any) -> frozenset[str]:
        """See :class:`ProbeFactory`."""
        tower = self.tower(owner)
        names = {"vision_features"}
        if tower.deep is not None:
            names |= {"received_attention", "queries", "keys"}
            if tower.has_class_token:
                names.add("class_attention")
        if tower.shallow is not None and tower.has_class_token:
            names.add("shallow_class_attention")
        return frozenset(names)

    def joint_tower(self, owner: Any) -> Any | None:
        """See :class:`ProbeFactory`."""
        tower = self.tower(owner)
        return tower.vision_config if JointEncoder.may_share(tower.vision_config) else None

    def __call__(self, owner: Any, wanted: Collection[str], joint: JointEncoder | None) -> Probe:
        """See :class:`ProbeFactory`."""
        return TowerProbe(owner, self.tower(owner), self.pools, wanted, joint)


class _Caught(threading.local):
    """What this thread's encoding call has given so far; None outside of one."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] | None = None


class TowerProbe(Uncopyable):
    """Catches signals of a vision tower; attention is computed as the layer runs.

    Args:
        owner: the module that owns visual features.
        tower: its tower.
        pools: see :class:`TowerProbes`.
        wanted: names of the signals to catch.
        joint: what embeds patches in the joint space, if that is wanted.
    """

    def __init__(
        self,
        owner: Any,
        tower: Tower,
        pools: Mapping[str, Pool],
        wanted: Collection[str],
        joint: JointEncoder | None,
    ) -> None:
        self._owner = owner
        self._tower = tower
        self._pools = pools
        self._wanted = frozenset(wanted)
        self._joint = joint
        self._caught = _Caught()
        self._handles: list[RemovableHandle | Observation | NormObservation] = []
        if self._wanted & _FEATURES:
            self._handles.append(tower.projector.register_forward_pre_hook(self._catch_input))
        shallow = self._wanted & {"shallow_class_attention"}
        deep = self._wanted.intersection(SIGNALS) - shallow
        for module, names in ((tower.shallow, shallow), (tower.deep, deep)):
            if module is not None and names:
                self._handles.append(observe(module, self._catch(names)))

    def detach(self) -> None:
        """See :class:`Probe`; detaching twice does nothing."""
        handles, self._handles = self._handles, []
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)

    def begin(self) -> None:
        """See :class:`Probe`."""
        self._caught.parts = {}

    def read(
        self, modality: str, features: Sequence[Tensor], arguments: Mapping[str, Any]
    ) -> list[dict[str, Tensor]]:
        """See :class:`Probe`.

        Raises:
            MissingSignal: if the family's signals are not known for the modality.
            AttachmentError: if the tower did not see the tokens that came out.
        """
        caught, self._caught.parts = self._caught.parts or {}, None
        owner = type(self._owner).__name__
        pool = self._pools.get(modality)
        if pool is None:
            raise MissingSignal(
                f"{', '.join(sorted(self._wanted))}: not known for {modality} input of {owner}. "
                "Use a strategy that reads projected features only."
            )
        items: list[dict[str, Tensor]] = [{} for _ in features]
        for name in sorted(self._wanted):
            source = "projector" if name in _FEATURES else name
            if source not in caught:
                raise AttachmentError(
                    f"{owner} gave {modality} features without running the modules that "
                    f"{name!r} is read from: they were replaced or compiled. Attach first, then "
                    "compile; undo what replaced them."
                )
            pooled = self._pooled(name, caught[source], pool, features, arguments)
            if [len(signal) for signal in pooled] != [len(feature) for feature in features]:
                raise AttachmentError(
                    f"{name!r} of {[len(signal) for signal in pooled]} tokens, but {modality} "
                    f"features of {[len(feature) for feature in features]}: the tower of {owner} "
                    "did not see all that came out of it. Stages before or inside the encoder "
                    "change what it sees: behind them, use strategies that read features or the "
                    "prompt."
                )
            for item, signal in zip(items, pooled, strict=True):
                item[name] = signal
        return items

    def _pooled(
        self,
        name: str,
        parts: Sequence[Tensor],
        pool: Pool,
        features: Sequence[Tensor],
        arguments: Mapping[str, Any],
    ) -> list[Tensor]:
        """A signal at the granularity of the LLM's tokens."""
        signal = torch.cat(list(parts), dim=1 if self._tower.packed else 0)
        if name == "joint_image_embeddings" and self._joint is not None:
            signal = self._joint.embed_patches(signal)
        if name in _FEATURES and self._tower.concatenated > 1:
            return list(signal.unflatten(-1, (self._tower.concatenated, -1)).mean(-2))
        if signal.ndim == 2:
            pooled = pool(self._owner, signal[..., None], features, arguments)
            return [item[:, 0] for item in pooled]
        return pool(self._owner, signal, features, arguments)

    @outside_compilation
    def _catch_input(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if self._caught.parts is not None:
            states = args[0].detach()
            # A packed sequence comes without an axis of items.
            self._caught.parts.setdefault("projector", []).append(
                states[None] if states.ndim == 2 else states
            )

    def _catch(self, names: Collection[str]) -> Callback:
        @torch.no_grad()
        def callback(
            _: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
        ) -> None:
            parts = self._caught.parts
            if parts is None:
                return
            for queries, keys in segments(query, key, kwargs):
                for name in names:
                    signal = SIGNALS[name](queries, keys, kwargs["scaling"])
                    parts.setdefault(name, []).append(signal)

        return callback
