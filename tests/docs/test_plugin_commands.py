"""The five commands of the page on plugins, as a new user types them."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
[BLOCK] = re.findall(r"## In five commands\n.*?```sh\n(.*?)```", PAGE, re.S)
COMMANDS = BLOCK.strip().splitlines()


def test_there_are_five() -> None:
    assert len(COMMANDS) == 5
    assert COMMANDS[0] == "tokenreduce new my-strategy"


def test_every_kind_is_named() -> None:
    from tokenreduce_integrations.scaffold import KINDS

    for kind in KINDS:
        assert kind == "strategy" or f"`{kind}`" in PAGE or f"--kind {kind}`" in PAGE


@pytest.mark.slow
def test_they_work_from_an_empty_folder(tmp_path: Path) -> None:
    """TokenReduce and the plugin are installed by pip; other libraries are those of this venv."""
    venv.create(tmp_path / "venv", with_pip=True)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(others), encoding="utf-8")
    programs = tmp_path / "venv" / "bin"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("TOKENREDUCE_", "PYTEST_"))},
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        # Nothing is fetched: pip reads "0" as not to isolate the build.
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_IGNORE_INSTALLED": "1",
    }
    folder = tmp_path / "empty"
    folder.mkdir()
    for line in (f"pip install -q {ROOT}", *COMMANDS):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "144 -> 18 (my-strategy at projector)" in done.stdout
