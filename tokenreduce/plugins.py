"""Finding, isolating and reporting plugins.

Every entry point of the group ``tokenreduce`` names a module that holds hook implementations
(see :mod:`tokenreduce.hookspecs`). The built-in parts use that same door. A plugin that fails is
recorded with its reason and leaves nothing behind; it never takes the program down.

Environment:
    ``TOKENREDUCE_PLUGINS``: comma-separated entry-point names to load; all if unset.
    ``TOKENREDUCE_STRICT``: if ``1``, a failing plugin raises :class:`PluginError`.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any, Literal

import pluggy

from tokenreduce import hookspecs
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.errors import PluginError, RegistrationError, did_you_mean
from tokenreduce.hookspecs import GROUP, PLUGIN_API_VERSION
from tokenreduce.registry import ComponentRecord, ModelAdapterRegistry, Registry
from tokenreduce.signals import SignalRecord

State = Literal["loaded", "failed", "skipped"]
Phase = Literal["import", "interface", "registration"]

#: Seconds from which on a plugin's import is worth a remark: listing strategies takes a tenth.
SLOW = 0.5


@dataclass(frozen=True, kw_only=True)
class PluginStatus:
    """What became of one plugin.

    Attributes:
        name: the entry-point name.
        module: the module that it names.
        distribution: the distribution that ships it, with its version.
        state: loaded, failed, or skipped by ``TOKENREDUCE_PLUGINS``.
        error: the last line of the traceback of a failed plugin, else an empty string.
        phase: what a failed plugin failed at: its import, the interface (its hooks, or the version
            that it was written for), or what it registered; else an empty string.
        hooks: the hooks that it implements.
        registered: the names it registered, as ``"strategy lftr"``.
        seconds: how long importing and registering took.
    """

    name: str
    module: str
    distribution: str = ""
    state: State = "loaded"
    error: str = ""
    phase: Phase | Literal[""] = ""
    hooks: tuple[str, ...] = ()
    registered: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def slow(self) -> bool:
        """Whether it delays every program that uses TokenReduce."""
        return self.seconds > SLOW


@dataclass
class Plugins:
    """All registries, and the status of every plugin that filled them."""

    strategies: Registry[StrategyRecord] = field(
        default_factory=lambda: Registry("strategy", StrategyRecord)
    )
    signals: Registry[SignalRecord] = field(
        default_factory=lambda: Registry("signal", SignalRecord)
    )
    model_adapters: ModelAdapterRegistry = field(default_factory=ModelAdapterRegistry)
    neighbor_backends: Registry[ComponentRecord] = field(
        default_factory=lambda: Registry("neighbor backend", ComponentRecord)
    )
    quantizers: Registry[ComponentRecord] = field(
        default_factory=lambda: Registry("quantizer", ComponentRecord)
    )
    encoder_pruners: Registry[ComponentRecord] = field(
        default_factory=lambda: Registry("encoder pruner", ComponentRecord)
    )
    presets: Registry[ComponentRecord] = field(
        default_factory=lambda: Registry("preset", ComponentRecord)
    )
    observers: Registry[ComponentRecord] = field(
        default_factory=lambda: Registry("observer", ComponentRecord)
    )
    statuses: list[PluginStatus] = field(default_factory=list)

    def load(self, name: str, plugin: object, *, distribution: str = "") -> PluginStatus:
        """Register everything that one plugin (a module or object with hooks) offers.

        Nothing of a plugin that fails stays registered.

        Args:
            name: how to call the plugin.
            plugin: the object whose attributes are hook implementations.
            distribution: what to blame in errors.

        Raises:
            PluginError: never; the returned status says what failed.
        """
        started = time.perf_counter()
        added: list[tuple[Registry[Any], str]] = []
        phase: Phase = "interface"
        try:
            hooks = self._hooks_of(name, plugin)
            phase = "registration"
            for hook, call in hooks.items():
                registry = getattr(self, hook.removeprefix("register_"))
                call(register=_registrar(registry, distribution or name, added))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (recorded, and raised if strict)
            for registry, record_name in reversed(added):
                registry.remove(record_name)
            return self._record(
                PluginStatus(
                    name=name,
                    module=_module_name(plugin),
                    distribution=distribution,
                    state="failed",
                    error=_last_line(error),
                    phase=phase,
                    seconds=time.perf_counter() - started,
                ),
                error,
            )
        return self._record(
            PluginStatus(
                name=name,
                module=_module_name(plugin),
                distribution=distribution,
                hooks=tuple(hooks),
                registered=tuple(f"{registry.kind} {record}" for registry, record in added),
                seconds=time.perf_counter() - started,
            )
        )

    def load_entry_points(self, entry_points: Iterable[metadata.EntryPoint]) -> None:
        """Load plugins from entry points, the built-in ones first."""
        selected = _selected_names()
        ours: list[metadata.EntryPoint] = []
        theirs: list[metadata.EntryPoint] = []
        for entry_point in entry_points:
            (ours if _is_builtin(entry_point) else theirs).append(entry_point)
        for entry_point in sorted(ours, key=_order) + sorted(theirs, key=_order):
            source = _distribution(entry_point)
            if selected is not None and entry_point.name not in selected:
                status = PluginStatus(
                    name=entry_point.name,
                    module=entry_point.value,
                    distribution=source,
                    state="skipped",
                    error="left out by TOKENREDUCE_PLUGINS",
                )
                self.statuses.append(status)
                continue
            started = time.perf_counter()
            try:
                # What a plugin prints must not end up in a program's own output.
                with redirect_stdout(sys.stderr):
                    plugin = entry_point.load()
            except (Exception, SystemExit) as error:  # noqa: BLE001 (recorded, as above)
                self._record(
                    PluginStatus(
                        name=entry_point.name,
                        module=entry_point.value,
                        distribution=source,
                        state="failed",
                        error=_last_line(error),
                        phase="import",
                        seconds=time.perf_counter() - started,
                    ),
                    error,
                )
                continue
            import_seconds = time.perf_counter() - started
            status = self.load(entry_point.name, plugin, distribution=source)
            self.statuses[-1] = replace(
                status, module=entry_point.value, seconds=status.seconds + import_seconds
            )

    def _hooks_of(self, name: str, plugin: object) -> dict[str, Any]:
        """The hook implementations of a plugin, checked by pluggy against the specifications."""
        wanted = getattr(plugin, "tokenreduce_api", PLUGIN_API_VERSION)
        if wanted != PLUGIN_API_VERSION:
            newer = isinstance(wanted, int) and wanted > PLUGIN_API_VERSION
            raise PluginError(
                f"plugin {name!r} was written for plugin API {wanted}, this is TokenReduce with "
                f"plugin API {PLUGIN_API_VERSION}. "
                f"Upgrade {'TokenReduce' if newer else 'the plugin'}, or install an older release "
                f"of {'the plugin' if newer else 'TokenReduce'}."
            )
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        manager.register(plugin, name=name)
        known = {spec for spec in vars(hookspecs) if spec.startswith("register_")}
        callers = manager.get_hookcallers(plugin) or []
        for caller in callers:
            if caller.name not in known:
                raise PluginError(
                    f"plugin {name!r} implements the unknown hook {caller.name!r}. "
                    f"{did_you_mean(caller.name, known)}"
                )
        if not callers:
            raise PluginError(
                f"plugin {name!r} implements no hook: mark its functions with "
                "@tokenreduce.hookimpl."
            )
        return {caller.name: caller for caller in callers}

    def _record(self, status: PluginStatus, error: BaseException | None = None) -> PluginStatus:
        self.statuses.append(status)
        if error is not None and strict():
            raise PluginError(
                f"plugin {status.name!r} ({status.distribution or status.module}) failed: "
                f"{status.error}"
            ) from error
        return status


def strict() -> bool:
    """Whether a failing plugin is an error, as ``TOKENREDUCE_STRICT=1`` says."""
    return os.environ.get("TOKENREDUCE_STRICT") == "1"


@cache
def installed() -> Plugins:
    """The registries of this process, filled from the installed entry points on first use."""
    found = Plugins()
    found.load_entry_points(metadata.entry_points(group=GROUP))
    return found


def _registrar(
    registry: Registry[Any], distribution: str, added: list[tuple[Registry[Any], str]]
) -> Any:
    def register(name: str, *target: str, **fields: Any) -> None:
        if len(target) > 1:
            raise RegistrationError(f"{registry.kind} {name!r}: one target, got {target!r}.")
        if target:
            fields["target"] = target[0]
        try:
            record = registry.make_record(name=name, distribution=distribution, **fields)
        except TypeError as error:
            raise RegistrationError(f"{registry.kind} {name!r}: {error}") from error
        registry.add(record)
        added.append((registry, name))

    return register


def _selected_names() -> set[str] | None:
    chosen = os.environ.get("TOKENREDUCE_PLUGINS")
    if chosen is None:
        return None
    return {name.strip() for name in chosen.split(",") if name.strip()}


def _is_builtin(entry_point: metadata.EntryPoint) -> bool:
    return _distribution(entry_point).partition(" ")[0] == "tokenreduce"


def _order(entry_point: metadata.EntryPoint) -> tuple[str, str]:
    return _distribution(entry_point), entry_point.name


def _distribution(entry_point: metadata.EntryPoint) -> str:
    dist = entry_point.dist
    # Unpacked by hand or half removed, a distribution can lack its metadata.
    if dist is None or dist.metadata is None or "Name" not in dist.metadata:
        return ""
    return f"{dist.name} {dist.version}"


def _module_name(plugin: object) -> str:
    return plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__


def _last_line(error: BaseException) -> str:
    summary = traceback.TracebackException.from_exception(error)
    # Notes come after the line that names the error.
    summary.__notes__ = None
    return " ".join(list(summary.format_exception_only())[-1].split())
