"""What all that is put on a live model has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from tokenreduce.errors import AttachmentError

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
