"""What all that is put on a live model has in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from tokenreduce.errors import AttachmentError

_ABSENT = object()

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


@dataclass(frozen=True)
class Replacement:
    """A method of an instance that something stands in for.

    Args:
        owner: the instance.
        name: the method.
        substitute: what stands in.
        before: what the instance itself held under the name.
    """

    owner: Any
    name: str
    substitute: object
    before: object


def replace_method(owner: Any, name: str, substitute: Callable[..., Any]) -> Replacement:
    """Put something in the place of a method, on the instance alone."""
    before = vars(owner).get(name, _ABSENT)
    setattr(owner, name, substitute)
    return Replacement(owner, name, substitute, before)


def restore_methods(replacements: Sequence[Replacement]) -> None:
    """Put methods back, the latest first.

    Raises:
        AttachmentError: if something else replaced a method since; the others are put back.
    """
    buried = []
    for replaced in reversed(replacements):
        owner, name = replaced.owner, replaced.name
        if vars(owner).get(name) is not replaced.substitute:
            buried.append(f"{type(owner).__name__}.{name}")
        elif replaced.before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, replaced.before)
    if buried:
        raise AttachmentError(
            f"cannot restore {', '.join(sorted(set(buried)))}: something else replaced it after "
            "the pipeline was attached. Undo that first; detach in the reverse order of attaching."
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
