"""Which releases of transformers are supported, and that every place says the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import tokenreduce as tr
from support.reducers import UnevenRandom
from support.tiny_models import llava
from tokenreduce.errors import UnsupportedRelease
from tokenreduce_integrations.transformers.release import NEXT_MAJOR, OLDEST

ROOT = Path(__file__).resolve().parents[3]


def pretend(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another release seem to be installed. The library puts another module object in place of
    itself on first use, so the one that is there now is asked for."""
    monkeypatch.setattr(sys.modules["transformers"], "__version__", release)


@pytest.mark.parametrize("release", ["4.57.6", "5.18.0", "6.0.0", "6.1.0.dev0"])
def test_another_release_is_refused_where_a_pipeline_is_attached(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = llava()
    pretend(release, monkeypatch)
    with pytest.raises(
        UnsupportedRelease, match=rf"{re.escape(release)} is installed.*pip install"
    ):
        tr.attach(case.model, UnevenRandom())


@pytest.mark.parametrize("release", [f"{OLDEST}.0", "5.22.0.dev0", "5.99.1"])
def test_a_supported_release_is_attached_to(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = llava()
    pretend(release, monkeypatch)
    tr.attach(case.model, UnevenRandom()).detach()


@pytest.mark.parametrize("page", ["pyproject.toml", "README.md", "docs/generation.md"])
def test_the_requirement_is_stated_alike_everywhere(page: str) -> None:
    assert f"transformers>={OLDEST},<{NEXT_MAJOR}" in (ROOT / page).read_text(encoding="utf-8")


def test_the_sessions_of_nox_run_the_oldest_release() -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert f"transformers=={OLDEST}.0" in text
