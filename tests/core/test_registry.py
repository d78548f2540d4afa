import sys
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.api import create_strategy, list_strategies, strategy_info
from tokenreduce.errors import (
    BudgetError,
    MissingExtra,
    PipelineError,
    RegistrationError,
    TokenReduceError,
    UnknownName,
    UnsupportedSite,
)
from tokenreduce.plugins import installed
from tokenreduce.registry import ComponentRecord, Registry, import_target


def registry(**targets: str) -> Registry[ComponentRecord]:
    made = Registry("widget", ComponentRecord)
    for name, target in targets.items():
        made.add(ComponentRecord(name=name, target=target, distribution="acme 1.0"))
    return made


def test_a_registry_is_a_sorted_mapping() -> None:
    widgets = registry(b="json:dumps", a="json:loads")
    assert list(widgets) == ["a", "b"]
    assert len(widgets) == 2
    assert "a" in widgets
    assert "c" not in widgets
    assert widgets["a"].target == "json:loads"
    assert dict(widgets.items())["b"].name == "b"


def test_get_answers_with_the_default() -> None:
    widgets = registry(a="json:loads")
    assert widgets.get("a") is widgets["a"]
    assert widgets.get("c") is None
    assert widgets.get("c", 3) == 3


def test_a_registry_cannot_be_assigned_to() -> None:
    with pytest.raises(TypeError):
        registry()["a"] = 1  # type: ignore[index]


def test_unknown_names_suggest() -> None:
    with pytest.raises(UnknownName, match=r"unknown widget 'lods'. Did you mean 'loads'\?"):
        registry(loads="json:loads")["lods"]
    with pytest.raises(LookupError, match="Known: none"):
        registry()["x"]


def test_a_target_is_imported_on_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy_widget.py").write_text("class Outer:\n    class Inner: pass\n")
    widgets = registry(lazy="lazy_widget:Outer.Inner")
    assert "lazy_widget" not in sys.modules
    assert widgets.resolve("lazy").__name__ == "Inner"
    del sys.modules["lazy_widget"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module:x", "no module named 'no_such_module'"),
        ("json:no_such_object", "has no object 'no_such_object'"),
        ("json:loads.deeper", "has no object 'loads.deeper'"),
        ("fails_with_value:x", "importing 'fails_with_value' failed: ValueError: inside"),
        ("fails_with_exit:x", "importing 'fails_with_exit' failed: SystemExit: bye"),
        ("fails_with_import:x", "importing 'fails_with_import' failed: ImportError: half"),
    ],
)
def test_a_target_that_cannot_be_imported_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_with_value.py").write_text("raise ValueError('inside')")
    (tmp_path / "fails_with_exit.py").write_text("raise SystemExit('bye')")
    (tmp_path / "fails_with_import.py").write_text("raise ImportError('half')")
    with pytest.raises(RegistrationError, match=f"widget 'a': .*{message}"):
        registry(a=target).resolve("a")


def test_our_own_errors_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fails_with_ours.py").write_text(
        "from tokenreduce.errors import BudgetError\nraise BudgetError('ours')"
    )
    with pytest.raises(BudgetError, match=r"^ours$"):
        registry(a="fails_with_ours:x").resolve("a")


@pytest.mark.parametrize(("module", "missing"), [("a_user", "absent"), ("absentee", "absent")])
def test_a_missing_extra_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, missing: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"{module}.py").write_text(f"import {missing}")
    widgets = Registry("widget", ComponentRecord)
    widgets.add(
        ComponentRecord(name="w", target=f"{module}:x", extra="gpu", distribution="acme 1.0")
    )
    with pytest.raises(MissingExtra, match=rf"needs the package '{missing}'.*'acme\[gpu\]'"):
        widgets.resolve("w")
    with pytest.raises(MissingExtra, match=r"'tokenreduce\[gpu\]'"):
        import_target(f"{module}:x", what="it", extra="gpu")
    with pytest.raises(RegistrationError):
        import_target(f"{module}:x", what="it")


def test_a_taken_name_names_both() -> None:
    widgets = registry(a="json:loads")
    with pytest.raises(RegistrationError, match=r"'zeta 2' is already registered by 'acme 1\.0'"):
        widgets.add(ComponentRecord(name="a", target="json:dumps", distribution="zeta 2"))


@pytest.mark.parametrize("target", ["json", "json:", ":loads", ""])
def test_a_target_is_module_and_object(target: str) -> None:
    with pytest.raises(RegistrationError, match="is not 'module:object'"):
        registry(a=target)


def test_removing() -> None:
    widgets = registry(a="json:loads")
    widgets.remove("a")
    assert len(widgets) == 0
    with pytest.raises(UnknownName):
        widgets.remove("a")


# -- strategies by name ----------------------------------------------------------------------


def test_strategies_are_listed_by_pattern_and_site() -> None:
    assert list_strategies() == sorted(installed().strategies)
    assert "norm-topk" in list_strategies()
    assert list_strategies("norm-*") == ["norm-topk"]
    assert list_strategies("no-such-*") == []
    assert "norm-topk" in list_strategies(site="projector")
    assert "avg-pool" not in list_strategies(site="decoder")
    with pytest.raises(UnsupportedSite, match="unknown site 'head'"):
        list_strategies(site="head")  # type: ignore[arg-type]


def test_info_and_creation_agree() -> None:
    assert "projector" in strategy_info("norm-topk").sites
    assert create_strategy("norm-topk", keep=3).record is strategy_info("norm-topk")


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("norm-top", {}, UnknownName, "Did you mean 'norm-topk'"),
        ("norm-topk", {"kep": 3}, PipelineError, "no option 'kep'. Did you mean 'keep'"),
        ("norm-topk", {"keep": 3, "reduction": 2}, BudgetError, "two budgets"),
        ("per-frame", {"keep": 9}, PipelineError, "'per-frame' needs the option 'inner'"),
    ],
)
def test_creation_is_checked(
    name: str, options: dict[str, Any], error: type[TokenReduceError], message: str
) -> None:
    with pytest.raises(error, match=message):
        create_strategy(name, **options)


def test_every_registered_target_exists() -> None:
    """Components whose optional dependency is missing say so; all others resolve."""
    plugins = installed()
    for registry in (plugins.strategies, plugins.model_adapters, plugins.neighbor_backends):
        for name, record in registry.items():
            try:
                registry.resolve(name)
            except MissingExtra:
                assert record.extra
