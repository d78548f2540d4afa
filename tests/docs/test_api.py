"""The reference covers what is public."""

from __future__ import annotations

import re
from pathlib import Path

import tokenreduce as tr

ROOT = Path(__file__).resolve().parents[2]


def test_every_public_name_is_in_the_reference() -> None:
    pages = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    for name in set(tr.__all__) - {"__version__"}:
        home = f"tokenreduce.{tr._HOME_OF[name]}"
        assert any(home == page or home.startswith(f"{page}.") for page in pages), (name, home)
