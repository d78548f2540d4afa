"""The hooks that a plugin may implement. Each is handed ``register`` and calls it with plain data.

A hook may gain arguments in a later release but never lose one, and a plugin may leave out those
that it does not use.
"""

from collections.abc import Callable
from typing import Any

import pluggy

#: Raised by one whenever a hook or the meaning of a record changes incompatibly.
PLUGIN_API_VERSION = 1

GROUP = "tokenreduce"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)

Register = Callable[..., Any]


@hookspec
def register_strategies(register: Register) -> None:
    """Register strategies: ``register(name, "module:Class", summary=..., **capabilities)``."""


@hookspec
def register_signals(register: Register) -> None:
    """Register signals: ``register(name, dims=("batch", "tokens"), meaning=...)``."""


@hookspec
def register_model_adapters(register: Register) -> None:
    """Register model adapters: ``register(name, "module:Class", models=("module.Class",))``."""


@hookspec
def register_neighbor_backends(register: Register) -> None:
    """Register nearest-neighbour backends: ``register(name, "module:Class")``."""


@hookspec
def register_quantizers(register: Register) -> None:
    """Register quantization backends: ``register(name, "module:Class")``."""


@hookspec
def register_encoder_pruners(register: Register) -> None:
    """Register pruners of vision encoders: ``register(name, "module:Class")``."""


@hookspec
def register_presets(register: Register) -> None:
    """Register named pipelines: ``register(name, "module:MAPPING")``, a YAML-like mapping."""


@hookspec
def register_observers(register: Register) -> None:
    """Register observers: ``register(name, "module:function")``, called with each receipt."""
