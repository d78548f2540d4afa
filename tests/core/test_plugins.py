import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tokenreduce.errors import PluginError
from tokenreduce.hookspecs import PLUGIN_API_VERSION, hookimpl
from tokenreduce.plugins import Plugins, PluginStatus, installed
from tokenreduce.receipt import Receipt, notify_observers

GOOD = """
    from tokenreduce import hookimpl

    @hookimpl
    def register_strategies(register):
        register("good", "good_strategy:Good", summary="Good.", sites=("projector", "vision"))
"""

BROKEN = {
    "raises": ("raise RuntimeError('no such thing')", "RuntimeError: no such thing"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "imports": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "syntax": ("def :", "SyntaxError: invalid syntax"),
    "notes": (
        """
        error = ValueError("first")
        error.add_note("a note")
        raise error
        """,
        "ValueError: first",
    ),
    "hook-raises": (
        """
        from tokenreduce import hookimpl

        @hookimpl
        def register_strategies(register):
            register("half", "m:C", summary="Registered before the failure.")
            raise KeyError("later")
        """,
        "KeyError: 'later'",
    ),
    "hook-exits": (
        """
        from tokenreduce import hookimpl

        @hookimpl
        def register_signals(register):
            register("half", dims=("batch",), meaning="")
            raise SystemExit(3)
        """,
        "SystemExit: 3",
    ),
    "misspelt": (
        """
        from tokenreduce import hookimpl

        @hookimpl
        def register_strategy(register):
            register("half", "m:C", summary="")
        """,
        "unknown hook 'register_strategy'. Did you mean 'register_strategies'",
    ),
    "too-many-arguments": (
        """
        from tokenreduce import hookimpl

        @hookimpl
        def register_strategies(register, extra):
            pass
        """,
        "extra",
    ),
    "no-hooks": ("x = 1", "implements no hook"),
    "other-api": (
        f"""
        from tokenreduce import hookimpl
        tokenreduce_api = {PLUGIN_API_VERSION + 1}

        @hookimpl
        def register_strategies(register):
            register("half", "m:C", summary="")
        """,
        f"plugin API {PLUGIN_API_VERSION + 1}",
    ),
}

BAD_RECORDS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no summary": (("x", "m:C"), {}, "summary"),
    "no target": (("x",), {"summary": ""}, "target"),
    "two targets": (("x", "m:C", "m:D"), {"summary": ""}, "one target"),
    "target without object": (("x", "module"), {"summary": ""}, "'module' is not 'module:object'"),
    "unknown field": (("x", "m:C"), {"summary": "", "color": 1}, "color"),
    "kind": (("x", "m:C"), {"summary": "", "kind": "shrink"}, "kind='shrink' is not one of"),
    "count": (("x", "m:C"), {"summary": "", "count": "some"}, "count='some'"),
    "cost": (("x", "m:C"), {"summary": "", "cost": "free"}, "cost='free'"),
    "parity": (("x", "m:C"), {"summary": "", "parity": "sure"}, "parity='sure'"),
    "site": (("x", "m:C"), {"summary": "", "sites": ("head",)}, "'head'"),
    "no site": (("x", "m:C"), {"summary": "", "sites": ()}, "sites"),
    "site as word": (("x", "m:C"), {"summary": "", "sites": "vision"}, "sites must be a tuple"),
    "needs numbers": (("x", "m:C"), {"summary": "", "needs": (3,)}, "needs must be a tuple"),
    "summary as number": (("x", "m:C"), {"summary": 3}, "summary must be a str"),
    "flag as word": (("x", "m:C"), {"summary": "", "wraps": "yes"}, "wraps must be a bool"),
    "presets as list": (("x", "m:C"), {"summary": "", "presets": ["a"]}, "presets must map"),
    "preset as number": (("x", "m:C"), {"summary": "", "presets": {"a": 3}}, "presets must map"),
}


class _Distribution(metadata.Distribution):
    """An installed distribution, as far as plugins look at it."""

    def __init__(self, name: str | None, version: str = "1.0") -> None:
        self._text = f"Name: {name}\nVersion: {version}\n" if name else ""

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return path


def entry_point(name: str, distribution: str | None = "acme") -> metadata.EntryPoint:
    """The entry point of a module of the same name."""
    point = metadata.EntryPoint(name=name, value=name.replace("-", "_"), group="tokenreduce")
    vars(point).update(dist=_Distribution(distribution))
    return point


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes an importable module."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write_module(name: str, source: str) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        written.append(module)

    yield write_module
    for module in written:
        sys.modules.pop(module, None)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENREDUCE_PLUGINS", raising=False)
    monkeypatch.delenv("TOKENREDUCE_STRICT", raising=False)


def names(plugins: Plugins) -> set[str]:
    return {
        name
        for registry in vars(plugins).values()
        if not isinstance(registry, list)
        for name in registry
    }


def by_name(plugins: Plugins) -> dict[str, PluginStatus]:
    return {status.name: status for status in plugins.statuses}


def test_a_plugin_registers(write: Any) -> None:
    write("good", GOOD)
    plugins = Plugins()
    plugins.load_entry_points([entry_point("good")])
    (status,) = plugins.statuses
    assert status.state == "loaded"
    assert status.distribution == "acme 1.0"
    assert status.module == "good"
    assert status.hooks == ("register_strategies",)
    assert status.registered == ("strategy good",)
    assert plugins.strategies["good"].distribution == "acme 1.0"
    assert "good_strategy" not in sys.modules


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_recorded_and_leaves_nothing(write: Any, name: str) -> None:
    source, reason = BROKEN[name]
    write(name, source)
    write("good", GOOD)
    plugins = Plugins()
    plugins.load_entry_points([entry_point(name, "bad"), entry_point("good")])
    status = by_name(plugins)[name]
    assert status.state == "failed"
    assert reason in status.error
    assert "\n" not in status.error
    assert status.distribution == "bad 1.0"
    assert status.registered == ()
    assert names(plugins) == {"good"}
    assert by_name(plugins)["good"].state == "loaded"


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_capability_data_is_refused(case: str) -> None:
    arguments, fields, reason = BAD_RECORDS[case]

    @hookimpl
    def register_strategies(register: Any) -> None:
        register("fine", "m:C", summary="Registered before.")
        register(*arguments, **fields)

    plugins = Plugins()
    status = plugins.load("bad", SimpleNamespace(register_strategies=register_strategies))
    assert status.state == "failed"
    assert status.error.startswith("tokenreduce.errors.RegistrationError: ")
    assert reason in status.error
    assert names(plugins) == set()


def test_a_signal_must_begin_with_the_batch() -> None:
    @hookimpl
    def register_signals(register: Any) -> None:
        register("odd", dims=("tokens",), meaning="")

    status = Plugins().load("bad", SimpleNamespace(register_signals=register_signals))
    assert "must begin with 'batch'" in status.error


def test_a_taken_name_names_both_distributions(write: Any) -> None:
    write("good", GOOD)
    write("thief", "from tokenreduce import hookimpl\n" + textwrap.dedent(GOOD))
    plugins = Plugins()
    plugins.load_entry_points([entry_point("thief", "zeta"), entry_point("good", "acme")])
    status = by_name(plugins)["thief"]
    assert status.state == "failed"
    assert "'zeta 1.0'" in status.error
    assert "'acme 1.0'" in status.error
    assert plugins.strategies["good"].distribution == "acme 1.0"


def test_built_in_names_cannot_be_taken(write: Any) -> None:
    write("good", GOOD)
    plugins = Plugins()
    plugins.load_entry_points([entry_point("good", "aaa"), entry_point("good", "tokenreduce")])
    assert [status.state for status in plugins.statuses] == ["loaded", "failed"]
    assert plugins.strategies["good"].distribution == "tokenreduce 1.0"


def test_a_failure_gives_back_only_its_own_names(write: Any) -> None:
    write("good", GOOD)
    write(
        "thief",
        """
        from tokenreduce import hookimpl

        @hookimpl
        def register_strategies(register):
            register("mine", "m:C", summary="")
            register("good", "m:C", summary="")
        """,
    )
    plugins = Plugins()
    plugins.load_entry_points([entry_point("good", "acme"), entry_point("thief", "zeta")])
    assert names(plugins) == {"good"}


def test_strict_mode_raises(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write("raises", BROKEN["raises"][0])
    monkeypatch.setenv("TOKENREDUCE_STRICT", "1")
    with pytest.raises(PluginError, match=r"'raises' \(acme 1.0\) failed: RuntimeError"):
        Plugins().load_entry_points([entry_point("raises")])


def test_strict_mode_raises_for_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENREDUCE_STRICT", "1")
    with pytest.raises(PluginError, match="implements no hook"):
        Plugins().load("empty", ModuleType("empty"))


@pytest.mark.parametrize(
    ("chosen", "loaded"),
    [("good", {"good"}), ("good, other", {"good", "other"}), ("", set()), (",", set())],
)
def test_plugins_can_be_chosen(
    write: Any, monkeypatch: pytest.MonkeyPatch, chosen: str, loaded: set[str]
) -> None:
    write("good", GOOD)
    write("other", GOOD.replace('"good"', '"other"'))
    write("raises", BROKEN["raises"][0])
    monkeypatch.setenv("TOKENREDUCE_PLUGINS", chosen)
    plugins = Plugins()
    plugins.load_entry_points(entry_point(name) for name in ("good", "other", "raises"))
    assert names(plugins) == loaded
    states = {name: status.state for name, status in by_name(plugins).items()}
    assert states["raises"] == "skipped"
    assert all(states[name] == "loaded" for name in loaded)
    assert by_name(plugins)["raises"].error == "left out by TOKENREDUCE_PLUGINS"


@pytest.mark.parametrize("distribution", [None, "acme"])
def test_a_distribution_without_metadata_does_no_harm(write: Any, distribution: str | None) -> None:
    write("good", GOOD)
    point = entry_point("good", distribution)
    if distribution is not None:
        vars(point).update(dist=None)
    plugins = Plugins()
    plugins.load_entry_points([point])
    assert plugins.statuses[0].state == "loaded"
    assert plugins.statuses[0].distribution == ""


def test_all_built_in_plugins_load() -> None:
    states = {
        status.name: status
        for status in installed().statuses
        if status.distribution.startswith("tokenreduce ")
    }
    assert {"signals", "neighbors", "strategies", "transformers"} <= set(states)
    assert [status.error for status in states.values() if status.state != "loaded"] == []


def test_every_hook_is_documented_and_has_a_registry() -> None:
    from tokenreduce import hookspecs

    plugins = Plugins()
    hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
    assert len(hooks) >= 8
    for hook in hooks:
        assert getattr(hookspecs, hook).__doc__
        assert hasattr(plugins, hook.removeprefix("register_"))


def registering(hook: str, *args: Any, **fields: Any) -> SimpleNamespace:
    """A plugin with one hook that registers one thing."""

    def implementation(register: Any) -> None:
        register(*args, **fields)

    implementation.__name__ = hook
    return SimpleNamespace(**{hook: hookimpl(implementation)})


@pytest.mark.parametrize(
    ("hook", "args", "fields", "message"),
    [
        ("register_strategies", (123, "m:C"), {"summary": "x"}, "a name is lower-case"),
        ("register_strategies", ("", "m:C"), {"summary": "x"}, "a name is lower-case"),
        ("register_strategies", ("a b", "m:C"), {"summary": "x"}, "a name is lower-case"),
        ("register_strategies", ("ab", "m:C"), {"summary": "x\ny"}, "one line"),
        ("register_model_adapters", ("zz", "m:C"), {"models": 5}, "models must be a tuple"),
        ("register_model_adapters", ("zz", "m:C"), {"models": "a.B.C"}, "models must be a tuple"),
        (
            "register_model_adapters",
            ("zz", "m:C"),
            {"models": ("transformers.modeling_utils.PreTrainedModel",)},
            "which 'transformers' of",
        ),
    ],
)
def test_bad_data_is_refused_and_harms_nothing(
    hook: str, args: tuple[Any, ...], fields: dict[str, Any], message: str
) -> None:
    plugins = Plugins()
    plugins.load_entry_points(metadata.entry_points(group="tokenreduce"))
    status = plugins.load("acme", registering(hook, *args, **fields), distribution="acme 1.0")
    assert status.state == "failed"
    assert message in status.error
    assert "lftr" in list(plugins.strategies)
    assert "zz" not in plugins.model_adapters


def test_an_observer_that_fails_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENREDUCE_STRICT", raising=False)
    plugin = registering("register_observers", "loud", f"{__name__}:raise_something")
    status = installed().load("acme", plugin)
    assert status.state == "loaded", status.error
    try:
        with pytest.warns(RuntimeWarning, match="observer 'loud' failed: ValueError"):
            notify_observers(Receipt())
        monkeypatch.setenv("TOKENREDUCE_STRICT", "1")
        with pytest.raises(PluginError, match="loud"):
            notify_observers(Receipt())
    finally:
        installed().observers.remove("loud")


def raise_something(receipt: Receipt) -> None:
    raise ValueError("no")


def test_a_model_adapter_may_claim_modules_by_pattern() -> None:
    from tokenreduce.attachment import find_adapter
    from tokenreduce.errors import UnsupportedModel

    plugin = registering(
        "register_model_adapters",
        "patterned",
        f"{__name__}:SimpleNamespace",
        models=("shipped_modules.*.modeling_x.Model",),
    )
    parent = type("Model", (torch.nn.Module,), {"__module__": "shipped_modules.f.0a1b.modeling_x"})
    child = type("Child", (parent,), {"__module__": "elsewhere"})
    other = type("Model", (torch.nn.Module,), {"__module__": "shipped_modules.modeling_x"})
    status = installed().load("acme", plugin)
    try:
        assert status.state == "loaded", status.error
        assert isinstance(find_adapter(parent()), SimpleNamespace)
        assert isinstance(find_adapter(child()), SimpleNamespace)
        with pytest.raises(UnsupportedModel):
            find_adapter(other())
    finally:
        installed().model_adapters.remove("patterned")
        installed().statuses.remove(status)
