"""Lazy registries: a name, an import string resolved on first use, and a record.

Listing a registry imports nothing but the plugins' registration functions, which are plain data.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, overload

from tokenreduce.errors import (
    MissingExtra,
    RegistrationError,
    TokenReduceError,
    UnknownName,
    did_you_mean,
)


class Record(Protocol):
    """What every registration record has in common."""

    @property
    def name(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def distribution(self) -> str: ...

    @property
    def extra(self) -> str: ...


R = TypeVar("R", bound=Record)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
D = TypeVar("D")


@dataclass(frozen=True, kw_only=True)
class ComponentRecord:
    """Registration record of a component other than a strategy.

    Attributes:
        name: the registered name.
        target: ``"module:object"``, imported on first use.
        summary: one line.
        extra: the optional dependency group that it needs, or an empty string.
        distribution: the distribution that registered it; filled in by the loader.
    """

    name: str
    target: str
    summary: str = ""
    extra: str = ""
    distribution: str = ""


@dataclass(frozen=True, kw_only=True)
class ModelAdapterRecord(ComponentRecord):
    """Registration record of a model adapter.

    Attributes:
        models: qualified names (``"module.Class"``) of the model classes it serves; a model is
            matched by the nearest class of its method resolution order, so naming a base class
            serves every subclass, and nothing is imported to find out. A name may hold ``*`` for
            any characters: classes that ship with a model live in modules whose names change with
            the files, as in ``"transformers_modules.*.modeling_x.Class"``.
        loader: ``"module:function"`` that loads such a model for a pipeline, or an empty string.
        saver: ``"module:function"`` that writes such a model to a folder that ``loader`` reads, or
            an empty string.
    """

    models: tuple[str, ...]
    loader: str = ""
    saver: str = ""

    def __post_init__(self) -> None:
        models = self.models
        if not isinstance(models, tuple | list) or not all(
            isinstance(model, str) and "." in model for model in models
        ):
            raise RegistrationError(
                f"model adapter {self.name!r}: models must be a tuple of qualified class names "
                f"such as ('package.module.Class',), got {models!r}."
            )
        object.__setattr__(self, "models", tuple(models))


class Registry(Mapping[str, R], Generic[R]):
    """A read-only mapping from names to registration records of one kind."""

    def __init__(self, kind: str, record: Callable[..., R]) -> None:
        self.kind = kind
        self.make_record = record
        self._records: dict[str, R] = {}

    def __getitem__(self, name: str) -> R:
        if not isinstance(name, str):
            raise UnknownName(f"a {self.kind} has a name, got {name!r}.")
        try:
            return self._records[name]
        except KeyError:
            raise UnknownName(
                f"unknown {self.kind} {name!r}. {did_you_mean(name, self._records)} "
                "'tokenreduce plugins' shows what is installed and what failed to load."
            ) from None

    # The mix-in method expects a KeyError of unknown names.
    @overload
    def get(self, name: str, /) -> R | None: ...
    @overload
    def get(self, name: str, default: R | D, /) -> R | D: ...
    def get(self, name: str, default: object = None, /) -> object:
        """The record of a name, or ``default`` if nothing registered it."""
        return self._records.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: R) -> None:
        """Add a record.

        Raises:
            RegistrationError: if the name is malformed or taken, or the target is not
                ``"module:object"``.
        """
        if not isinstance(record.name, str) or not _NAME.fullmatch(record.name):
            raise RegistrationError(
                f"{self.kind} {record.name!r}: a name is lower-case letters, digits, '.', '_' and "
                "'-', and begins with a letter or a digit."
            )
        summary = getattr(record, "summary", "")
        if not isinstance(summary, str) or "\n" in summary:
            raise RegistrationError(f"{self.kind} {record.name!r}: summary must be one line.")
        taken = self._records.get(record.name)
        if taken is not None:
            raise RegistrationError(
                f"{self.kind} {record.name!r} of {record.distribution or 'this program'!r} is "
                f"already registered by {taken.distribution or 'this program'!r}. "
                "Rename one, or uninstall one of the two."
            )
        module, colon, attribute = record.target.partition(":")
        if not (module and colon and attribute):
            raise RegistrationError(
                f"{self.kind} {record.name!r}: target {record.target!r} is not 'module:object'."
            )
        self._records[record.name] = record

    def remove(self, name: str) -> None:
        """Forget a record; unknown names are an error."""
        del self._records[self[name].name]

    def resolve(self, name: str) -> Any:
        """Import and return the object behind a name.

        Raises:
            UnknownName: if nothing registered the name.
            MissingExtra: if an optional dependency is missing, with the command that installs it.
            RegistrationError: if the target does not exist, or fails to import.
        """
        record = self[name]
        return import_target(
            record.target,
            what=f"{self.kind} {name!r}",
            extra=record.extra,
            distribution=record.distribution.partition(" ")[0] or "tokenreduce",
        )


class ModelAdapterRegistry(Registry[ModelAdapterRecord]):
    """Model adapters: no two may claim the same class."""

    def __init__(self) -> None:
        super().__init__("model adapter", ModelAdapterRecord)

    def add(self, record: ModelAdapterRecord) -> None:
        for other in self._records.values():
            shared = set(record.models) & set(other.models)
            if shared:
                raise RegistrationError(
                    f"model adapter {record.name!r} of {record.distribution or 'this program'!r} "
                    f"claims {', '.join(sorted(shared))}, which {other.name!r} of "
                    f"{other.distribution or 'this program'!r} serves. Claim a subclass, or "
                    "uninstall one of the two."
                )
        super().add(record)


def import_target(
    target: str, *, what: str, extra: str = "", distribution: str = "tokenreduce"
) -> Any:
    """Import ``"module:object"``.

    Args:
        target: the import string.
        what: how to call it in an error.
        extra: the optional dependency group to suggest when a module is missing.
        distribution: the distribution whose group it is.

    Raises:
        MissingExtra: if a module is missing and ``extra`` is given.
        RegistrationError: if the module or the object does not exist, or the module fails.
    """
    module_name, _, attribute = target.partition(":")
    try:
        with redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = f"{module_name}.".startswith(f"{error.name}.")
        if extra and error.name and not own:
            raise MissingExtra(
                f"{what} needs the package {error.name!r}, which is not installed. "
                f"Run: pip install '{distribution}[{extra}]'"
            ) from error
        raise RegistrationError(
            f"{what}: cannot import {target!r}: no module named {error.name!r}."
        ) from error
    except TokenReduceError:
        raise
    except (Exception, SystemExit) as error:
        raise RegistrationError(
            f"{what}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RegistrationError(f"{what}: module {module_name!r} has no object {attribute!r}.")
        found = getattr(found, part)
    return found
