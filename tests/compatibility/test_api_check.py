"""The check of the public interface against the last release, in a repository of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "api"
MODULE = '''"""A module."""


def keep(count, ratio=1.0):
    """Keep tokens."""
'''


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    names = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org"}
    names |= {"GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org"}
    return subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env={**os.environ, **names, "PATH": os.pathsep.join(programs), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    assert shutil.which("git")
    package = tmp_path / "tokenreduce"
    package.mkdir()
    (package / "__init__.py").write_text(MODULE)
    (package / "_version.py").write_text('__version__ = "0.1.0"\n')
    run("git", "init", "-q", "-b", "main", cwd=tmp_path)
    run("git", "add", "-A", cwd=tmp_path)
    assert run("git", "commit", "-qm", "First", cwd=tmp_path).returncode == 0
    return tmp_path


def test_without_a_release_there_is_nothing_to_keep(repository: Path) -> None:
    done = run(SCRIPT, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert "no release is tagged yet" in done.stdout


def test_changes_are_compared_with_the_last_release(repository: Path) -> None:
    run("git", "tag", "v0.1.0", cwd=repository)
    done = run(SCRIPT, cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is missing since v0.1.0" in done.stdout

    module = repository / "tokenreduce" / "__init__.py"
    module.write_text(MODULE.replace("ratio=1.0", "ratio=1.0, total=None"))
    assert run(SCRIPT, cwd=repository).returncode == 0

    module.write_text(MODULE.replace(", ratio=1.0", ""))
    done = run(SCRIPT, cwd=repository)
    assert done.returncode == 1
    assert "ratio" in done.stdout + done.stderr
    assert "version 0.1.0 does not say so" in done.stderr

    version = repository / "tokenreduce" / "_version.py"
    version.write_text('__version__ = "0.1.1"\n')
    assert run(SCRIPT, cwd=repository).returncode == 1
    version.write_text('__version__ = "0.2.0"\n')
    done = run(SCRIPT, cwd=repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as version 0.2.0 says" in done.stdout


def test_from_the_first_major_version_on_its_number_counts(repository: Path) -> None:
    version = repository / "tokenreduce" / "_version.py"
    version.write_text('__version__ = "1.2.0"\n')
    run("git", "commit", "-qam", "Second", cwd=repository)
    run("git", "tag", "v1.2.0", cwd=repository)
    (repository / "tokenreduce" / "__init__.py").write_text('"""A module."""\n')
    version.write_text('__version__ = "1.3.0"\n')
    assert run(SCRIPT, cwd=repository).returncode == 1
    version.write_text('__version__ = "2.0.0"\n')
    assert run(SCRIPT, cwd=repository).returncode == 0


def test_the_repository_keeps_its_own_interface() -> None:
    done = run(SCRIPT, cwd=SCRIPT.parent)
    assert done.returncode == 0, done.stdout + done.stderr
