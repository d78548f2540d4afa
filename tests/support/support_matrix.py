"""The record of what the family tests proved, and whether the committed one agrees with it.

TOKENREDUCE_WRITE_SUPPORT=1 pytest tests/integrations/transformers   # write
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from support.tiny_models import Case

PATH = Path(__file__).resolve().parents[2] / "docs" / "support_matrix.json"
_RECORD: dict[str, dict[str, Any]] = {}


def proved(name: str, column: str) -> None:
    _RECORD.setdefault(name, {})[column] = "yes"


def stock_cannot(name: str, column: str) -> None:
    _RECORD.setdefault(name, {})[column] = "stock"


def refused(name: str, reason: str) -> None:
    """A model that the attachment refuses, with the reason that its error gives."""
    _RECORD.setdefault(name, {}).update(model=name, refused=reason)


def describe(name: str, case: Case, run: Any) -> None:
    """What the model's adapter offers beside what is proved here."""
    family = run.family
    offered = () if family.probe is None else sorted(family.probe.offers(run.owner))
    _RECORD.setdefault(name, {}).update(
        model=type(case.model).__name__,
        family=family.name,
        signals=list(offered),
        sites=list(family.sites),
    )


of_this_release = pytest.mark.skipif(
    not transformers.__version__.startswith("5.23."), reason="the record is of transformers 5.23"
)


def check() -> None:
    """Compare what was proved in this session with the committed record, or write that.

    A session of a part of the tests checks that part.
    """
    record = {name: dict(sorted(columns.items())) for name, columns in _RECORD.items()}
    if os.environ.get("TOKENREDUCE_WRITE_SUPPORT"):
        known = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
        merged = dict(sorted({**known, **record}.items()))
        PATH.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    committed = json.loads(PATH.read_text(encoding="utf-8"))
    wrong = [
        f"{name}: {column}"
        for name, columns in record.items()
        for column, value in columns.items()
        if committed.get(name, {}).get(column) != value
    ]
    assert not wrong, f"{PATH.name} says otherwise of {wrong}; see {__name__}"
