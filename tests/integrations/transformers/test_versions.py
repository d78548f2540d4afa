"""Which releases of transformers are supported, and that every place says the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import tokenreduce as tr
from support.reducers import UnevenRandom
from support.tiny_families import TINY
from support.tiny_models import CASES, llava
from tokenreduce.errors import UnsupportedRelease
from tokenreduce.pipeline import ModelSettings
from tokenreduce_integrations.transformers.loading import load_model
from tokenreduce_integrations.transformers.release import EARLIER, NEXT_MAJOR, OLDEST

EARLIEST = min(EARLIER.values(), key=Version)
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


@pytest.mark.parametrize("name", CASES)
def test_models_that_vllm_serves_are_attached_to_on_its_transformers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CASES[name]().model
    pretend(f"{EARLIEST}.0", monkeypatch)
    tr.attach(model, UnevenRandom()).detach()


def test_other_models_say_which_release_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["aya-vision"].case().model
    pretend(f"{EARLIEST}.0", monkeypatch)
    with pytest.raises(
        UnsupportedRelease,
        match=rf"attaches to AyaVision.* pip install 'transformers>={OLDEST},<6'",
    ):
        tr.attach(model, UnevenRandom())


def test_a_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TINY["aya-vision"].case().model.config.save_pretrained(tmp_path)
    pretend(f"{EARLIEST}.0", monkeypatch)
    with pytest.raises(UnsupportedRelease, match="AyaVision"):
        load_model(ModelSettings(path=str(tmp_path)), [tr.Stage(reducer=UnevenRandom())])


@pytest.mark.parametrize("page", ["README.md", "docs/generation.md"])
def test_the_requirement_is_stated_alike_everywhere(page: str) -> None:
    assert f"transformers>={OLDEST},<{NEXT_MAJOR}" in (ROOT / page).read_text(encoding="utf-8")


def test_what_vllm_allows_can_be_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"transformers>={EARLIEST},<{NEXT_MAJOR}"' in text


@pytest.mark.parametrize("release", [OLDEST, EARLIEST])
def test_the_sessions_of_nox_run_the_oldest_releases(release: str) -> None:
    text = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    assert f"transformers=={release}.0" in text
