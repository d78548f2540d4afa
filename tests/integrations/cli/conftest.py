from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tokenreduce_integrations.cli.app import app
from tokenreduce_integrations.testbed.scenes import Scene, SceneGenerator

Run = Callable[..., Any]

PIPELINE = """
model: {path: "testbed:b", dtype: float32, device: cpu}
reduce:
  - {strategy: norm-topk, reduction: 8}
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenreduce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    runner = CliRunner()

    def run(*arguments: object) -> Any:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture(scope="session")
def scene() -> Scene:
    return SceneGenerator(seed=3).sample()


@pytest.fixture
def picture(tmp_path: Path, scene: Scene) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(scene.image).save(path)
    return path


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)
    return path
