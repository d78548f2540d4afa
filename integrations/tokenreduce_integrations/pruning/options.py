"""Options of the pruning backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real
from typing import Any

from tokenreduce.errors import PipelineError, did_you_mean
from tokenreduce_integrations import options as shared

WHERE = "model.vision_encoder.prune"


def refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """See :func:`tokenreduce_integrations.options.refuse_unknown`."""
    shared.refuse_unknown(options, known, WHERE)


def share(options: Mapping[str, Any], name: str) -> Fraction:
    """The share to remove that an option states, 0 if it is not given.

    Raises:
        PipelineError: if it is not in [0, 1).
    """
    value = options.get(name, 0)
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not 0 <= value < 1:
        raise PipelineError(
            f"{WHERE}.{name}: is the share to remove, at least 0 and less than 1, got {value!r}."
        )
    return Fraction(str(value))


def choice(options: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str:
    """One of several words; the first is the default.

    Raises:
        PipelineError: if it is another one.
    """
    value = options.get(name, known[0])
    if value not in known:
        raise PipelineError(f"{WHERE}.{name}: {value!r}. {did_you_mean(str(value), known)}")
    return str(value)


def whole(options: Mapping[str, Any], name: str, default: int) -> int:
    """See :func:`tokenreduce_integrations.options.whole`."""
    return shared.whole(options, name, default, WHERE)


def text(options: Mapping[str, Any], name: str) -> str:
    """A text that is not empty.

    Raises:
        PipelineError: if it is missing, or anything else.
    """
    value = options.get(name)
    if not isinstance(value, str) or not value:
        raise PipelineError(f"{WHERE}.{name}: must be a path, got {value!r}.")
    return value
