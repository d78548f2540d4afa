"""Third-party packages, as a user installs them: separate folders and separate processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

NEAR_MEAN = '''
    """Keeps the tokens nearest to the mean, for a test."""

    from dataclasses import dataclass

    from tokenreduce import Scorer, hookimpl


    @hookimpl
    def register_strategies(register):
        """One strategy."""
        register(
            "near-mean",
            "tokenreduce_near_mean:NearMean",
            summary="Keeps the tokens nearest to the mean.",
            sites=("projector",),
        )


    @dataclass(frozen=True, kw_only=True)
    class NearMean(Scorer):
        """Keeps the tokens nearest to the mean.

        Args:
            sharpness: how much a distance counts.
        """

        sharpness: float = 1.0

        def score(self, tokens):
            features = tokens.features.float()
            return -self.sharpness * (features - features.mean(1, keepdim=True)).norm(dim=-1)
'''

BROKEN = 'raise RuntimeError("this plugin is broken")\n'

PROJECT = """
    [build-system]
    requires = ["hatchling"]
    build-backend = "hatchling.build"

    [project]
    name = "{name}"
    version = "2.5"
    description = "A plugin of a test."

    [project.entry-points.tokenreduce]
    {entry} = "{module}"

    [tool.hatch.build.targets.wheel]
    include = ["{module}.py"]
"""

PIPELINE = """
model: {path: "testbed:b", dtype: float32, device: cpu}
reduce:
  - {strategy: near-mean, sharpness: 2, keep: 12}
"""

PACKAGES = {
    "tokenreduce-near-mean": ("near-mean", "tokenreduce_near_mean", NEAR_MEAN),
    "tokenreduce-broken": ("broken", "tokenreduce_broken", BROKEN),
}


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    """Both packages as an installer leaves them."""
    site = tmp_path / "site"
    for name, (entry, module, source) in PACKAGES.items():
        info = site / f"{name.replace('-', '_')}-2.5.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text(f"[tokenreduce]\n{entry} = {module}\n")
    return site


@pytest.fixture
def installed_by_pip(tmp_path: Path) -> Path:
    """Both packages, built and installed into a folder of their own."""
    site = tmp_path / "site"
    projects = []
    for name, (entry, module, source) in PACKAGES.items():
        project = tmp_path / name
        project.mkdir()
        (project / f"{module}.py").write_text(textwrap.dedent(source))
        settings = PROJECT.format(name=name, entry=entry, module=module)
        (project / "pyproject.toml").write_text(textwrap.dedent(settings))
        projects.append(str(project))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--no-build-isolation", "--target", str(site), *projects], check=True, timeout=300
    )
    return site


def command(site: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tokenreduce_integrations.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=site.parent,
        timeout=300,
        check=False,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("TOKENREDUCE_")},
            "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )


def document(done: subprocess.CompletedProcess[str]) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_found_beside_a_broken_sibling(site: Path) -> None:
    records = {record["name"]: record for record in document(command(site, "list", "--json"))}
    assert records["near-mean"]["distribution"] == "tokenreduce-near-mean 2.5"
    assert "norm-topk" in records
    listed = command(site, "list")
    assert "near-mean" in listed.stdout
    assert "Plugins that failed to load: broken." in listed.stderr
    statuses = {status["name"]: status for status in document(command(site, "plugins", "--json"))}
    assert statuses["near-mean"]["state"] == "loaded"
    assert statuses["broken"]["state"] == "failed"
    assert statuses["broken"]["error"] == "RuntimeError: this plugin is broken"
    assert statuses["broken"]["distribution"] == "tokenreduce-broken 2.5"
    card = document(command(site, "info", "near-mean", "--json"))
    assert {"name": "sharpness", "type": "float", "default": "1.0"}.items() <= card["options"][
        -1
    ].items()


def runs_in_a_pipeline(site: Path, picture: Path) -> None:
    file = site.parent / "plugin.yaml"
    file.write_text(PIPELINE)
    question = "what digit is shown ?"
    answered = document(command(site, "run", file, picture, question, "--json"))
    assert answered["receipt"]["tokens_out"] == 12
    assert answered["receipt"]["items"][0]["stages"][0]["strategy"] == "near-mean"


def is_refused_when_misspelt(site: Path, picture: Path) -> None:
    file = site.parent / "plugin.yaml"
    refused = command(site, "run", file, picture, "what ?", "reduce.0.sharpnes=2")
    assert refused.returncode == 1
    assert "reduce[0].sharpnes" in refused.stderr
    assert "Did you mean 'sharpness'" in refused.stderr


def passes_the_checks(site: Path) -> None:
    checked = command(site, "check", "near-mean")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_package_on_the_path(unpacked: Path, picture: Path) -> None:
    is_found_beside_a_broken_sibling(unpacked)
    runs_in_a_pipeline(unpacked, picture)


def test_plugins_can_be_left_out(unpacked: Path) -> None:
    chosen = "signals,strategies"
    records = document(command(unpacked, "list", "--json", TOKENREDUCE_PLUGINS=chosen))
    assert "near-mean" not in {record["name"] for record in records}


def test_strict_mode_stops_at_the_broken_one(unpacked: Path) -> None:
    done = command(unpacked, "list", TOKENREDUCE_STRICT="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: plugin 'broken' (tokenreduce-broken 2.5) failed")


@pytest.mark.slow
def test_a_package_that_pip_installed(installed_by_pip: Path, tmp_path: Path) -> None:
    from tokenreduce_integrations.testbed.scenes import SceneGenerator

    picture = tmp_path / "scene.png"
    Image.fromarray(SceneGenerator(seed=3).sample().image).save(picture)
    is_found_beside_a_broken_sibling(installed_by_pip)
    runs_in_a_pipeline(installed_by_pip, picture)
    is_refused_when_misspelt(installed_by_pip, picture)
    passes_the_checks(installed_by_pip)
