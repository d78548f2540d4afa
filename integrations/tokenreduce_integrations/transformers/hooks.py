"""What all that is put on a live model has in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from tokenreduce.errors import AttachmentError

ABSENT = object()
"""Where an instance holds nothing under a name."""

Function = TypeVar("Function", bound=Callable[..., Any])


def outside_compilation(function: Function) -> Function:
    """Keep a hook out of compiled graphs: traced, it would be recompiled for every new length."""
    disabled: Function = torch.compiler.disable(function)
    return disabled


class Uncopyable:
    """What a model holds while a pipeline is attached, and a copy of the model must not hold."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AttachmentError(
            "a model cannot be copied or pickled while a pipeline is attached: the copy's hooks "
            "would act on the original. Detach, copy, and attach to each."
        )


def restore_methods(owner: Any, wrapped: Mapping[str, tuple[object, object]]) -> None:
    """Put back methods of an instance.

    Args:
        owner: the instance.
        wrapped: for each method, what the instance held under its name before (``ABSENT`` for
            nothing), and the wrapper.

    Raises:
        AttachmentError: if a wrapper is not in its place any more; the others are restored.
    """
    buried = []
    for name, (before, wrapper) in wrapped.items():
        if vars(owner).get(name) is not wrapper:
            buried.append(name)
        elif before is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
    if buried:
        raise AttachmentError(
            f"cannot restore {', '.join(buried)} of {type(owner).__name__}: something else "
            "replaced it after the pipeline was attached. Undo that first; detach in the reverse "
            "order of attaching."
        )


def require_in_place(parent: nn.Module, name: str, module: nn.Module) -> None:
    """Check that a module that is listened to has not been wrapped since, as PEFT adapters do.

    Raises:
        AttachmentError: if it has: what it says is no longer all of what its parent hears.
    """
    if getattr(parent, name) is not module:
        raise AttachmentError(
            f"{name} of {type(parent).__name__} was replaced or wrapped (by PEFT adapters?) after "
            "the pipeline was attached, which reads a signal from it. Detach and attach again."
        )
