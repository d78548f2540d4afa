"""The page on signals says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from support.tiny_models import CASES
from tokenreduce.plugins import installed
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.rows import DECODER_SIGNALS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "signals.md").read_text(encoding="utf-8")
FAMILIES = {f.name: f for f in vars(families).values() if isinstance(f, families.Family)}
BUILD: dict[str, Any] = {family.lower(): build for family, build in CASES.items()} | {
    "llava-onevision": CASES["onevision"]
}


def family_rows() -> dict[str, dict[str, str]]:
    [text] = re.findall(r"<!-- families -->\n(.*?)<!-- /families -->", PAGE, re.S)
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_signal_of_the_vocabulary_is_explained() -> None:
    table = PAGE.partition("## ")[0]
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.M))))
    own = {n for n, r in installed().signals.items() if r.distribution.startswith("tokenreduce ")}
    assert listed == own - DECODER_SIGNALS


def test_every_family_with_signals_has_a_row() -> None:
    with_signals = {name for name, family in FAMILIES.items() if family.probe is not None}
    assert family_rows().keys() == with_signals | {families.GENERIC.name}


@pytest.mark.parametrize("name", sorted(family_rows().keys() & FAMILIES.keys()))
def test_rows_are_true(name: str) -> None:
    row, probe = family_rows()[name], FAMILIES[name].probe
    assert row["prompt_embeddings"] == "yes"
    if probe is None:
        assert set(row.values()) == {name, "no", "yes", "-"}
        return
    owner = BUILD[name.lower()]().model.model
    offered = probe.offers(owner)
    for column, cell in row.items():
        for signal in column.split(", "):
            if signal in installed().signals and signal != "prompt_embeddings":
                embeddings = getattr(getattr(owner, "vision_tower", None), "embeddings", None)
                has_class = any(hasattr(embeddings, n) for n in ("class_embedding", "cls_token"))
                given = {"yes": True, "no": False}.get(cell, has_class)
                assert (signal in offered) == given, (name, signal)
    assert (probe.joint_tower(owner) is not None) == (row["joint embeddings"] != "no")
