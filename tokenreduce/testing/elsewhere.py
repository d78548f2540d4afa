"""A device that is not there: code that leaves tensors on the CPU fails as it would on a GPU.

Tensors of the pretended device hold their numbers on the CPU, but say that they lie on ``meta``,
and refuse to meet tensors that do not. Like on a real device, scalars and indices may come from the
CPU, and copies go both ways. Where that is asked for, tensors for which no device was named are
taken for ones that lie there, so that only devices that were written down count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: No kernel of this device is ever run; torch creates its tensors on every machine.
DEVICE = torch.device("meta")

_aten = torch.ops.aten
#: Operators that take tensors of several devices.
_CROSSING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._to_copy.default,
    _aten.copy_.default,
}


class Mixed(RuntimeError):
    """An operator was given tensors of several devices."""


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.held = inner
        found: Elsewhere = made
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.held!r} elsewhere"

    def tolist(self) -> Any:
        """The numbers, as from any device."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """Python numbers become tensors without an operator that could be seen."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name not in ("tensor", "as_tensor", "new_tensor"):
            return func(*args, **given)
        wanted = given.pop("device", None)
        if name == "new_tensor":
            like, *args_ = args
            given.setdefault("dtype", like.dtype)
            wanted, func, args = wanted or like.device, torch.tensor, tuple(args_)
        made = func(*args, **given)
        return made if wanted is None else made.to(wanted)


class _Factories(TorchFunctionMode):
    """Tensors for which no device is named are made on the pretended one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _FACTORIES and given.get("device") is None:
            given["device"] = DEVICE
        return func(*args, **given)


_FACTORIES = {
    torch.arange,
    torch.as_tensor,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.tensor,
    torch.zeros,
}


@contextmanager
def pretending(*, by_default: bool = False) -> Iterator[torch.device]:
    """For as long as the context is open there is one more device.

    Args:
        by_default: whether tensors for which no device is named are made there.
    """
    seen: Any = _Operators
    with seen(), _Constants(), _Factories() if by_default else nullcontext():
        yield DEVICE


def moved(tensor: Tensor) -> Tensor:
    """A copy on the pretended device."""
    return Elsewhere(tensor.clone())


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    if there and func not in _CROSSING:
        for tensor in tensors:
            if not isinstance(tensor, Elsewhere) and tensor.ndim > 0:
                raise Mixed(f"{func} was given tensors of the features' device and of the CPU")
    wanted = kwargs.get("device")
    goes = bool(there) if wanted is None else torch.device(wanted) == DEVICE
    if func is _aten.copy_.default:
        goes = isinstance(args[0], Elsewhere)
    made = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if func._schema.name.endswith("_") and there and isinstance(args[0], Elsewhere):
        return args[0]
    same = {id(tensor.held): tensor for tensor in there}

    def returned(value: Any) -> Any:
        if not goes or not isinstance(value, Tensor) or isinstance(value, Elsewhere):
            return value
        return same.get(id(value)) or Elsewhere(value)

    return tree_map(returned, made)


def _inner(value: Any) -> Any:
    if isinstance(value, Elsewhere):
        return value.held
    if isinstance(value, torch.device) and value == DEVICE:
        return torch.device("cpu")
    return value
