"""Which releases of vLLM are supported, and what becomes of TokenReduce in another one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

from tokenreduce.errors import UnsupportedRelease
from tokenreduce_integrations import vllm as integration
from tokenreduce_integrations.vllm import release, unsupported
from tokenreduce_integrations.vllm.families import FAMILIES
from tokenreduce_integrations.vllm.release import NEWER, OLDEST

ROOT = Path(__file__).resolve().parents[3]
NAME = "TokenReduceLlavaForConditionalGeneration"
OTHERS = ["0.31.2", "0.34.0", "0.34.0rc1", "1.0.0", "0.31.0+cpu"]


def pretend(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(release, "installed_build", lambda: ("vllm", Version(version)))


@pytest.mark.parametrize("version", OTHERS)
def test_the_classes_are_refused_in_another_release(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(version, monkeypatch)
    with pytest.raises(UnsupportedRelease, match=rf"{re.escape(version)} is.*>={OLDEST},<{NEWER}"):
        getattr(unsupported, NAME)


def test_a_build_under_another_name_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "vllm_rocket-0.33.1.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-rocket\nVersion: 0.33.1\n")
    (record / "RECORD").write_text("vllm/__init__.py,,\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(release, "_BUILDS", ())
    found = release.installed_build()
    assert found is not None
    assert found == ("vllm-rocket", Version("0.33.1"))


def test_nothing_else_is_looked_up_there() -> None:
    assert not hasattr(unsupported, "LlavaForConditionalGeneration")


def test_the_requirement_is_stated_alike() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'vllm = ["vllm>={OLDEST},<{NEWER}"]' in text


@pytest.fixture
def registered_anew() -> Iterator[None]:
    yield
    integration.register()


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("registered_anew")
def test_vllm_itself_goes_on_in_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in FAMILIES:
        MODELS_CONFIG_MAP.pop(name, None)
    pretend(f"{NEWER}.0", monkeypatch)
    integration.register()
    assert not set(FAMILIES) & set(MODELS_CONFIG_MAP)
    with pytest.raises(UnsupportedRelease, match=f"{NEWER}.0 is installed"):
        ModelRegistry.models[NAME].load_model_cls()
    monkeypatch.undo()
    integration.register()
    assert ModelRegistry.models[NAME].load_model_cls().__name__ == NAME
