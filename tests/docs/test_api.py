"""The reference covers what is public."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenreduce as tr
from tokenreduce import ops

ROOT = Path(__file__).resolve().parents[2]
MODULES = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)


def test_every_public_name_is_in_the_reference() -> None:
    for name in set(tr.__all__) - {"__version__"}:
        home = f"tokenreduce.{tr._HOME_OF[name]}"
        assert any(home == page or home.startswith(f"{page}.") for page in MODULES), (name, home)


def test_every_primitive_is_in_the_reference() -> None:
    homes = {getattr(getattr(ops, name), "__module__", MODULES[0]) for name in ops.__all__}
    assert homes <= set(MODULES)


def public(holder: object) -> Iterator[tuple[str, object]]:
    """Functions and classes that a module defines or exports, or methods of a class."""
    exported = getattr(holder, "__all__", ())
    fields = getattr(holder, "__dataclass_fields__", ())
    for name, value in vars(holder).items():
        if name in fields:
            continue
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        if isinstance(value, property) or inspect.isfunction(value) or inspect.isclass(value):
            here = inspect.isclass(holder) or value.__module__ == holder.__name__  # type: ignore[attr-defined, union-attr]
            if name in exported or (here and not name.startswith("_")):
                yield name, value


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module: str) -> None:
    """A method may inherit its docstring, a class may not."""
    home = importlib.import_module(module)
    missing = [] if home.__doc__ else [module]
    for name, value in public(home):
        missing += [] if value.__doc__ else [name]
        if inspect.isclass(value):
            missing += [
                f"{name}.{method}"
                for method, _ in public(value)
                if not inspect.getdoc(getattr(value, method))
            ]
    assert not missing
