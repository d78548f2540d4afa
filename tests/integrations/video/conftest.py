from __future__ import annotations

from pathlib import Path

import pytest

from support.qwen_files import save_model


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> Path:
    """A tiny Qwen2.5-VL and its processor, as files."""
    return save_model(tmp_path_factory.mktemp("qwen"), pixels=112 * 112)
