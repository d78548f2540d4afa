"""What plugins rely on may grow, and loses nothing: compared with a snapshot.

After an addition, and only then, write the snapshot anew:

    python tests/compatibility/test_hooks.py
"""

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenreduce import hookspecs
from tokenreduce.capabilities import StrategyRecord
from tokenreduce.registry import ComponentRecord, ModelAdapterRecord
from tokenreduce.signals import SignalRecord

SNAPSHOT = Path(__file__).with_name("hooks.json")
RECORDS = (StrategyRecord, SignalRecord, ModelAdapterRecord, ComponentRecord)


def described(specs: Any, records: Any = RECORDS) -> dict[str, Any]:
    """Hooks with their arguments, and what may be said of what is registered."""
    return {
        "api": specs.PLUGIN_API_VERSION,
        "hooks": {
            name: list(inspect.signature(hook).parameters)
            for name, hook in sorted(vars(specs).items())
            if name.startswith("register_")
        },
        "records": {
            record.__name__: {
                field.name: _default(field)
                for field in dataclasses.fields(record)
                if field.name != "distribution"
            }
            for record in records
        },
    }


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def broken(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a plugin that was written before would miss."""
    found = []
    for name, arguments in before["hooks"].items():
        if name not in now["hooks"]:
            found.append(f"hook {name} is gone")
        elif now["hooks"][name][: len(arguments)] != arguments:
            found.append(f"hook {name} lost or moved an argument")
    for record, fields in before["records"].items():
        after = now["records"].get(record, {})
        for name, default in fields.items():
            if name not in after:
                found.append(f"{record}.{name} is gone")
            elif after[name] != default:
                found.append(f"{record}.{name} has another default")
        found += [
            f"{record}.{name} is new and required"
            for name, default in after.items()
            if name not in fields and default == "required"
        ]
    return found


def snapshot() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    return loaded


def test_nothing_that_plugins_rely_on_is_lost() -> None:
    before, now = snapshot(), described(hookspecs)
    assert before["api"] <= now["api"]
    if before["api"] == now["api"]:
        assert broken(before, now) == []


def test_the_snapshot_is_up_to_date() -> None:
    assert snapshot() == described(hookspecs)


def fake(**hooks: Any) -> Any:
    return SimpleNamespace(PLUGIN_API_VERSION=1, **hooks)


def no_arguments() -> None:
    """A hook that lost its argument."""


def renamed(registrar: Any) -> None:
    """A hook whose argument has another name."""


def wider(register: Any, context: Any) -> None:
    """A hook that gained an argument."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrow:
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    name: str
    kind: str = "merge"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demanding:
    name: str
    kind: str = "prune"
    licence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wide:
    name: str
    kind: str = "prune"
    licence: str = ""


BEFORE = {
    "api": 1,
    "hooks": {"register_things": ["register"]},
    "records": {"Record": {"name": "required", "kind": "'prune'"}},
}


@pytest.mark.parametrize(
    ("hook", "record", "message"),
    [
        (None, Wide, "hook register_things is gone"),
        (no_arguments, Wide, "lost or moved an argument"),
        (renamed, Wide, "lost or moved an argument"),
        (wider, Narrow, "Record.kind is gone"),
        (wider, Changed, "Record.kind has another default"),
        (wider, Demanding, "Record.licence is new and required"),
    ],
)
def test_what_would_break_a_plugin_is_found(hook: Any, record: Any, message: str) -> None:
    record = dataclasses.make_dataclass(
        "Record",
        [(f.name, f.type, f) for f in dataclasses.fields(record)],
        frozen=True,
        kw_only=True,
    )
    now = described(fake(**({"register_things": hook} if hook else {})), [record])
    [problem] = broken(BEFORE, now)
    assert message in problem


def test_growth_breaks_nothing() -> None:
    now = described(fake(register_things=wider, register_more=renamed), [])
    now["records"] = {"Record": described(fake(), [Wide])["records"]["Wide"]}
    assert broken(BEFORE, now) == []


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(described(hookspecs), indent=2) + "\n", encoding="utf-8")
