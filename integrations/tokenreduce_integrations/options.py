"""Options of the backends that pipelines name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tokenreduce.errors import PipelineError, did_you_mean


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse options that a backend does not have.

    Args:
        options: what the pipeline says.
        known: names of the backend's options.
        where: key path of the options in a pipeline.

    Raises:
        PipelineError: with the option that was likely meant.
    """
    names = list(known)
    for name in options:
        if name not in names:
            raise PipelineError(f"{where}.{name}: unknown option. {did_you_mean(name, names)}")


def whole(options: Mapping[str, Any], name: str, default: int, where: str) -> int:
    """A whole number of at least 1.

    Args:
        options: what the pipeline says.
        name: of the option.
        default: its value if it is not given.
        where: key path of the options in a pipeline.

    Raises:
        PipelineError: if it is anything else.
    """
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PipelineError(f"{where}.{name}: must be a whole number from 1 on, got {value!r}.")
    return value
