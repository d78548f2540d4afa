"""``tokenreduce new``: what it writes installs, lints clean, is listed and passes its own tests."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tokenreduce.errors import ProjectError
from tokenreduce.plugins import installed
from tokenreduce_integrations.scaffold import KINDS, LONGEST_NAME, write_project
from tokenreduce_integrations.testbed.scenes import SceneGenerator

ROOT = Path(__file__).resolve().parents[3]
NAMES = {
    "strategy": "my-strategy",
    "adapter": "my-adapter",
    "quantizer": "my-quantizer",
    "neighbors": "my-neighbors",
}


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOKENREDUCE_", "PYTEST_"))}
    return subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def install(project: Path, site: Path) -> None:
    """What an editable installation leaves: the entry points, and a path to the source."""
    name = project.name.replace("-", "_")
    info = site / f"{name}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project.name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        f"[tokenreduce]\n{project.name} = {name}.plugin\n", encoding="utf-8"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_passes_its_own_tests(kind: str, tmp_path: Path) -> None:
    name, site = NAMES[kind], tmp_path / "site"
    write_project(name, kind, tmp_path)
    project = tmp_path / name
    install(project, site)
    path = os.pathsep.join([str(site), str(project / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "TOKENREDUCE_STRICT": "1"}
    shown = run(
        sys.executable,
        "-m",
        "tokenreduce_integrations.cli",
        *(("list", name) if kind == "strategy" else ("plugins",)),
        cwd=tmp_path,
        **environment,
    )
    assert shown.returncode == 0, shown.stderr
    assert f"{name} 0.1.0" in shown.stdout
    tested = run(sys.executable, "-m", "pytest", "-q", cwd=project, **environment)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "skipped" not in tested.stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a", "ten-letter" * 3])
def test_what_is_written_is_clean(kind: str, name: str, tmp_path: Path) -> None:
    assert len(name) in (1, LONGEST_NAME)
    files = write_project(name, kind, tmp_path)
    assert tmp_path / name / "pyproject.toml" in files
    assert tmp_path / name / ".github" / "workflows" / "tests.yml" in files
    assert not [path for path in files if "$" in path.read_text(encoding="utf-8")]
    for arguments in (["check"], ["format", "--check"]):
        done = run(sys.executable, "-m", "ruff", *arguments, "--no-cache", ".", cwd=tmp_path / name)
        assert done.returncode == 0, done.stdout


def test_every_kind_has_templates_and_a_registry() -> None:
    for _, registry in KINDS.values():
        assert hasattr(installed(), registry)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Strategy", "lower-case letters"),
        ("my_strategy", "lower-case letters"),
        ("2x", "lower-case letters"),
        ("my--strategy", "lower-case letters"),
        ("../elsewhere", "lower-case letters"),
        ("", "lower-case letters"),
        ("a" * 31, "at most 30"),
        ("class", "Python itself"),
        ("json", "Python itself"),
        ("torch", "a module 'torch' is installed"),
        ("divprune", "a strategy of 'tokenreduce"),
    ],
)
def test_names_are_checked(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=message):
        write_project(name, "strategy", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_another_registry_is_free(tmp_path: Path) -> None:
    assert write_project("divprune", "adapter", tmp_path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    files = write_project("my-strategy", "strategy", tmp_path)
    files[0].write_text("mine", encoding="utf-8")
    with pytest.raises(ProjectError, match="there already"):
        write_project("my-strategy", "strategy", tmp_path)
    assert files[0].read_text(encoding="utf-8") == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProjectError, match="cannot be written"):
        write_project("my-strategy", "strategy", tmp_path / "file")


def test_the_command(tokenreduce, tmp_path: Path) -> None:
    done = tokenreduce("new", "my-strategy")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "my-strategy" / "src" / "my_strategy" / "strategy.py").is_file()
    assert "my-strategy/tests/test_strategy.py" in done.stdout
    assert "pip install -e 'my-strategy[test]'" in done.stdout
    again = tokenreduce("new", "my-strategy")
    assert again.exit_code == 1
    assert "nothing is overwritten" in again.output
    wrong = tokenreduce("new", "another", "--kind", "quantiser")
    assert wrong.exit_code == 1
    assert "Did you mean 'quantizer'" in wrong.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_installation(kind: str, tmp_path: Path) -> None:
    """TokenReduce from its wheel, and the package built and installed by pip, in a fresh venv."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip"]
    built = run(
        *pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT, cwd=tmp_path
    )
    assert built.returncode == 0, built.stderr
    [wheel] = wheels.iterdir()
    stored = {path for path in zipfile.ZipFile(wheel).namelist() if path.endswith(".template")}
    folder = ROOT / "integrations"
    assert stored == {
        path.relative_to(folder).as_posix() for path in folder.rglob("templates/**/*.template")
    }
    venv.create(tmp_path / "venv", with_pip=True)
    # The libraries are those of this environment, TokenReduce and the package are installed anew.
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(others), encoding="utf-8")
    python = tmp_path / "venv" / "bin" / "python"
    installing = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    outside = {"PYTHONPATH": ""}
    done = run(*installing, "--force-reinstall", wheel, cwd=tmp_path, **outside)
    assert done.returncode == 0, done.stderr
    command = tmp_path / "venv" / "bin" / "tokenreduce"
    name = NAMES[kind]
    done = run(command, "new", name, "--kind", kind, cwd=tmp_path, **outside)
    assert done.returncode == 0, done.stderr
    done = run(*installing, "-e", name, cwd=tmp_path, **outside)
    assert done.returncode == 0, done.stderr
    if kind == "strategy":
        assert f"{name} 0.1.0" in run(command, "list", name, cwd=tmp_path, **outside).stdout
    tested = run(python, "-m", "pytest", "-q", cwd=tmp_path / name, **outside)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    if kind != "adapter":
        Image.fromarray(SceneGenerator(seed=3).sample().image).save(tmp_path / "scene.png")
        question = ("scene.png", "what is the background ?")
        done = run(command, "run", f"{name}/pipeline.yaml", *question, cwd=tmp_path, **outside)
        assert done.returncode == 0, done.stderr
        assert "144 -> 18" in done.stdout
