"""Plugins that misbehave: each is reported for what it is, and nothing else is harmed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tokenreduce.hookspecs import PLUGIN_API_VERSION

STRATEGY = """
    from tokenreduce import hookimpl

    @hookimpl
    def register_strategies(register):
        register({name!r}, "tokenreduce_strategies.norm_topk:NormTopK", summary="A test.")
"""

#: What each does, the phase in which it fails, and what is said of it.
FAULTS = {
    "raises": (
        "print('noise on standard output')\nraise RuntimeError('no such thing')",
        "import",
        "RuntimeError: no such thing",
    ),
    "exits": ("import sys\nsys.exit('bye')", "import", "SystemExit: bye"),
    "thief": (
        STRATEGY.format(name="divprune"),
        "registration",
        "strategy 'divprune' of 'thief 1.0' is already registered by 'tokenreduce ",
    ),
    "half": (
        STRATEGY.format(name="half-a") + '\n        register("half-b", summary="No target.")\n',
        "registration",
        "strategy 'half-b'",
    ),
    "speller": (
        STRATEGY.format(name="spelled").replace("register_strategies", "register_stratgies"),
        "interface",
        "unknown hook 'register_stratgies'. Did you mean 'register_strategies'",
    ),
    "modern": (
        f"tokenreduce_api = {PLUGIN_API_VERSION + 1}\n"
        + textwrap.dedent(STRATEGY.format(name="modern")),
        "interface",
        f"written for plugin API {PLUGIN_API_VERSION + 1}, this is TokenReduce with plugin API "
        f"{PLUGIN_API_VERSION}. Upgrade TokenReduce",
    ),
    "ancient": (
        f"tokenreduce_api = {PLUGIN_API_VERSION - 1}\n"
        + textwrap.dedent(STRATEGY.format(name="ancient")),
        "interface",
        "Upgrade the plugin",
    ),
}
SOUND = {
    "sleeper": "import time\ntime.sleep(1)\n" + textwrap.dedent(STRATEGY.format(name="sleepy")),
    "zz-good": STRATEGY.format(name="good"),
}


def put(site: Path, name: str, source: str) -> None:
    module = name.replace("-", "_") + "_plugin"
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(textwrap.dedent(source))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[tokenreduce]\n{name} = {module}\n")


def command(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TOKENREDUCE_")}
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "tokenreduce_integrations.cli", *arguments],
        env={**kept, "PYTHONPATH": path, "COLUMNS": "200", **environment},
        cwd=site,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every faulty plugin and two sound ones, installed at once."""
    folder = tmp_path_factory.mktemp("site")
    for name, (source, _, _) in FAULTS.items():
        put(folder, name, source)
    for name, source in SOUND.items():
        put(folder, name, source)
    return folder


@pytest.fixture(scope="module")
def statuses(site: Path) -> dict[str, dict[str, object]]:
    done = command(site, "plugins", "--json")
    assert done.returncode == 0, done.stderr
    assert "noise on standard output" in done.stderr
    return {status["name"]: status for status in json.loads(done.stdout)}


@pytest.mark.parametrize("name", FAULTS)
def test_each_is_reported_for_what_it_is(statuses, name: str) -> None:
    _, phase, message = FAULTS[name]
    status = statuses[name]
    assert (status["state"], status["phase"]) == ("failed", phase)
    assert message in status["error"]
    assert status["distribution"] == f"{name} 1.0"
    assert status["registered"] == []
    assert 0 < status["seconds"] < 60


def test_one_that_hangs_for_a_second_is_loaded_and_remarked_upon(statuses, site: Path) -> None:
    assert statuses["sleeper"]["state"] == "loaded"
    assert statuses["sleeper"]["seconds"] >= 1
    shown = command(site, "plugins")
    assert shown.returncode == 0
    assert "sleeper (sleeper 1.0) takes 1." in shown.stderr
    for _, phase, _ in FAULTS.values():
        assert f"failed at {phase}" in shown.stdout


def test_nothing_else_is_harmed(statuses, site: Path) -> None:
    sound = [name for name in statuses if name not in FAULTS]
    assert len(sound) > 9
    assert {statuses[name]["state"] for name in sound} == {"loaded"}
    listed = command(site, "list", "--json")
    assert listed.returncode == 0, listed.stderr
    owners = {record["name"]: record["distribution"] for record in json.loads(listed.stdout)}
    assert owners["good"] == "zz-good 1.0"
    assert owners["sleepy"] == "sleeper 1.0"
    assert owners["divprune"].startswith("tokenreduce ")
    assert not {"half-a", "half-b", "spelled", "modern", "ancient"} & owners.keys()


def test_a_listing_says_what_failed(site: Path) -> None:
    listed = command(site, "list", "good")
    assert listed.returncode == 0
    failed = ", ".join(sorted(FAULTS))
    assert f"Plugins that failed to load: {failed}." in listed.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_strict_mode_makes_it_an_error(name: str, tmp_path: Path) -> None:
    source, _, message = FAULTS[name]
    put(tmp_path, name, source)
    done = command(tmp_path, "plugins", TOKENREDUCE_STRICT="1")
    assert done.returncode == 1
    assert f"error: plugin '{name}' ({name} 1.0) failed: " in done.stderr
    assert message in done.stderr
    assert done.stdout == ""
    left_out = command(
        tmp_path, "plugins", TOKENREDUCE_STRICT="1", TOKENREDUCE_PLUGINS="signals,strategies"
    )
    assert left_out.returncode == 0, left_out.stderr


@pytest.mark.parametrize("name", SOUND)
def test_strict_mode_lets_sound_ones_pass(name: str, tmp_path: Path) -> None:
    put(tmp_path, name, SOUND[name])
    assert command(tmp_path, "plugins", TOKENREDUCE_STRICT="1").returncode == 0
