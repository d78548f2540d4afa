"""Reading the queries and keys that an attention module attends with, its kernel unchanged.

transformers looks up the kernel of an attention module by the name in the module's ``config``. An
observed module is given a stand-in for that object which answers with a name of our own; the
function behind the name hands queries and keys (after rotary embeddings and norms, as attention
sees them) to the callbacks, and runs the kernel that the module would have run. Nothing else of
the model knows the stand-in, so masks are made as before.

Attention modules of timm look nothing up: theirs are read where they leave the norms of queries and
keys, which are there, as identities, also where nothing is normed.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from tokenreduce.errors import AttachmentError, UnsupportedModel
from tokenreduce_integrations.transformers.hooks import Uncopyable, outside_compilation

#: Called with (module, queries ``(B, H, Q, D)``, keys ``(B, H_kv, S, D)``, attention mask, the
#: kernel's further arguments, among them ``scaling``), before the kernel runs. What it returns, if
#: anything, is the mask that the kernel gets.
Callback = Callable[[nn.Module, Tensor, Tensor, Any, dict[str, Any]], Tensor | None]

_PREFIX = "tokenreduce_observed_"
_TIMM_ATTENTION = "timm.layers.attention.Attention"
_LOOKUP = ("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward")


class Observation:
    """A callback on an attention module."""

    def __init__(self, module: Any, callback: Callback) -> None:
        self._module = module
        self._callback = callback
        self._live = True
        if not isinstance(module.config, _ObservedConfig):
            module.config = _ObservedConfig(module.config)
        self._config: _ObservedConfig = module.config
        self._config.callbacks.append(callback)

    def remove(self) -> None:
        """Take the callback off; the last one puts the module's own configuration back.

        Removing twice does nothing.

        Raises:
            AttachmentError: if something else replaced the configuration since.
        """
        if not self._live:
            return
        self._live = False
        callbacks = self._config.callbacks
        del callbacks[next(i for i, held in enumerate(callbacks) if held is self._callback)]
        if callbacks:
            return
        if self._module.config is not self._config:
            raise AttachmentError(
                f"cannot restore the configuration of {type(self._module).__name__}: something "
                "else replaced it after the pipeline was attached. Undo that first; detach in the "
                "reverse order of attaching."
            )
        self._module.config = self._config.original


class NormObservation(Uncopyable):
    """A callback on an attention module of timm; the mask that it returns is not taken."""

    def __init__(self, module: Any, callback: Callback) -> None:
        self._module = module
        self._callback = callback
        self._latest = threading.local()
        self._handles = [
            module.q_norm.register_forward_hook(self._keep),
            module.k_norm.register_forward_hook(self._pair),
        ]

    def remove(self) -> None:
        """Take the callback off; removing twice does nothing."""
        for handle in self._handles:
            handle.remove()

    @outside_compilation
    def _keep(self, _: nn.Module, __: Any, query: Tensor) -> None:
        self._latest.query = query

    @outside_compilation
    def _pair(self, _: nn.Module, __: Any, key: Tensor) -> None:
        query = self._latest.__dict__.pop("query")
        self._callback(self._module, query, key, None, {"scaling": self._module.scale})


def observe(module: nn.Module, callback: Callback) -> Observation | NormObservation:
    """Call ``callback`` with queries and keys whenever an attention module attends.

    The kernel (SDPA, FlashAttention, eager) stays the one that the model is set to, also if that
    is changed meanwhile. A module that attends segment by segment calls back for each segment,
    unless its kernel takes the segments' bounds (``cu_seq_lens_q`` among the arguments).

    Args:
        module: an attention module of transformers, or of a timm ViT.
        callback: see :data:`Callback`.

    Raises:
        UnsupportedModel: if the module does not look up its kernel by the name in its ``config``.
    """
    if _norms_apart(module):
        return NormObservation(module, callback)
    if not _dispatches(module):
        raise UnsupportedModel(
            f"{type(module).__name__} does not look up its attention kernel through transformers' "
            "AttentionInterface: its queries and keys cannot be read. Use a strategy that needs "
            "no attention of this model."
        )
    return Observation(module, callback)


def observable(module: Any) -> bool:
    """Whether a module attends in a way that can be observed."""
    return _dispatches(module) or _norms_apart(module)


def _norms_apart(module: Any) -> bool:
    """Whether a module is timm's, and attends with what leaves the norms of queries and keys."""
    return f"{type(module).__module__}.{type(module).__name__}" == _TIMM_ATTENTION


def _dispatches(module: Any) -> bool:
    """Whether a module looks up its kernel by the name in its ``config``."""
    forward = inspect.unwrap(type(module).forward)
    looked_up = getattr(getattr(forward, "__code__", None), "co_names", ())
    return set(_LOOKUP) <= set(looked_up) and hasattr(
        getattr(module, "config", None), "_attn_implementation"
    )


class _ObservedConfig(Uncopyable):
    """Answers as the original does, apart from the name of the kernel.

    The name ends in that of the kernel, which transformers searches for ``"flash"``.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.callbacks: list[Callback] = []

    def __getattr__(self, name: str) -> Any:
        if name == "original":
            raise AttributeError(name)
        return getattr(self.original, name)

    @property
    def _attn_implementation(self) -> str:
        name = f"{_PREFIX}{self.original._attn_implementation}"
        if name not in AttentionInterface._global_mapping:
            AttentionInterface.register(name, _attend)
        return name


@outside_compilation
def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """The attention function of observed modules: callbacks, then the module's own kernel."""
    config: _ObservedConfig = module.config
    for callback in tuple(config.callbacks):
        mask = callback(module, query, key, attention_mask, kwargs)
        attention_mask = attention_mask if mask is None else mask
    interface, eager = (inspect.unwrap(type(module).forward).__globals__[name] for name in _LOOKUP)
    kernel = interface.get_interface(config.original._attn_implementation, eager)
    # Kernels read the configuration too; a twin, so that other threads still find it observed.
    twin = copy.copy(module)
    twin.config = config.original
    return kernel(twin, query, key, value, attention_mask, **kwargs)
