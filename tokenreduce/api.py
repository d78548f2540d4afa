"""Finding and creating strategies by name."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import TYPE_CHECKING, Any

from tokenreduce.capabilities import SITES, STAGE_KEYS, Site, StrategyRecord
from tokenreduce.errors import PipelineError, RegistrationError, UnsupportedSite, did_you_mean
from tokenreduce.plugins import installed

if TYPE_CHECKING:
    from tokenreduce.reducer import Reducer


def list_strategies(pattern: str = "*", *, site: Site | None = None) -> list[str]:
    """Names of the registered strategies, without importing any of them.

    Args:
        pattern: shell-style pattern of names.
        site: only those that run there.

    Raises:
        UnsupportedSite: if there is no such site.
    """
    if site is not None and site not in SITES:
        raise UnsupportedSite(f"unknown site {site!r}: one of {', '.join(SITES)}.")
    return [
        name
        for name, record in installed().strategies.items()
        if fnmatch.fnmatchcase(name, pattern) and (site is None or site in record.sites)
    ]


def strategy_info(name: str) -> StrategyRecord:
    """The registration record of a strategy.

    Raises:
        UnknownName: if nothing registered the name.
    """
    return installed().strategies[name]


def strategy_class(name: str) -> type[Reducer]:
    """Import and return the class of a strategy.

    Raises:
        UnknownName: if nothing registered the name.
        MissingExtra: if it needs a package that is not installed.
        RegistrationError: if the registered target is not a reducer, or fails to import.
    """
    from tokenreduce.reducer import Reducer

    registry = installed().strategies
    found = registry.resolve(name)
    if not (
        isinstance(found, type) and issubclass(found, Reducer) and dataclasses.is_dataclass(found)
    ):
        raise RegistrationError(
            f"strategy {name!r}: {registry[name].target!r} is not a class derived from "
            "tokenreduce.Reducer."
        )
    return found


def create_strategy(name: str, *, preset: str = "", **options: Any) -> Reducer:
    """Create a strategy by name.

    Args:
        name: a registered name.
        preset: the name of one of its presets, whose options hold where none is given here. Where
            a preset says more (a layer of the LLM, a schedule), that belongs to a stage:
            ``load_pipeline("fastv@official-k2-r50")`` has it.
        options: the budget (``keep``, ``keep_ratio`` or ``reduction``) and the strategy's fields.

    Raises:
        UnknownName: if nothing registered the name, or the strategy has no such preset.
        PipelineError: if the strategy has no such option, or a required one is missing.
        BudgetError: if the budget is contradictory or out of range.
        MissingExtra: if the strategy needs a package that is not installed.
        RegistrationError: if the registered target is not a reducer, or fails to import.
    """
    strategy = strategy_class(name)
    if preset:
        whole = strategy_info(name).preset(preset, options)
        options = {key: whole[key] for key in whole if key in options or key not in STAGE_KEYS}
    fields = [field for field in dataclasses.fields(strategy) if field.init]
    known = [field.name for field in fields]
    for option in options:
        if option not in known:
            raise PipelineError(
                f"strategy {name!r} has no option {option!r}. {did_you_mean(option, known)}"
            )
    for field in fields:
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in options:
            raise PipelineError(f"strategy {name!r} needs the option {field.name!r}.")
    return strategy(**options)
