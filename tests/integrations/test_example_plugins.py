"""The example plugins: each is found beside the built-in ones, and passes its own tests."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PLUGINS = sorted((Path(__file__).resolve().parents[2] / "examples" / "plugins").iterdir())


def test_there_are_two() -> None:
    assert [plugin.name for plugin in PLUGINS] == ["tokenreduce-hiprune", "tokenreduce-pebble"]


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: plugin.name)
def test_it_passes_its_own_tests(plugin: Path, tmp_path: Path) -> None:
    project = tomllib.loads((plugin / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [(entry, module)] = project["entry-points"]["tokenreduce"].items()
    info = tmp_path / f"{plugin.name.replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {plugin.name}\nVersion: {project['version']}\n"
    )
    (info / "entry_points.txt").write_text(f"[tokenreduce]\n{entry} = {module}\n")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOKENREDUCE_", "PYTEST_"))}
    path = [str(tmp_path), str(plugin / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **kept,
        "PYTHONPATH": os.pathsep.join(path),
        "TOKENREDUCE_STRICT": "1",
        "HF_HUB_OFFLINE": "1",
        # transformers copies the code of models there.
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=plugin,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
