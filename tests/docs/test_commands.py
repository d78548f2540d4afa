"""Commands in the README and the docs: all of them parse, and those in ``sh`` blocks run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from tokenreduce_integrations import testbed
from tokenreduce_integrations.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "yaml", "sh", "text", "toml", "json", "bibtex"}
SPAN = re.compile(r"`tokenreduce ([^`]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
#: Run by hand and by the workflow, from a clone of their own.
INSTALLS = ("git clone", "pytest", "pip install")


def fenced(*languages: str) -> list[Any]:
    """The fenced blocks of some languages, as parameters named after their page and order."""
    found = []
    for page in PAGES:
        blocks = FENCE.findall(page.read_text(encoding="utf-8"))
        found += [
            pytest.param(text, id=f"{page.name}-{i}")
            for i, (language, text) in enumerate(blocks)
            if language in languages
        ]
    return found


def commands() -> list[Any]:
    """The lines that call ``tokenreduce``."""
    return [
        pytest.param(line, id=f"{block.id}-{i}")
        for block in fenced("sh", "text")
        for i, line in enumerate(str(block.values[0]).splitlines())
        if line.startswith("tokenreduce ")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page: Path) -> None:
    languages = {language for language, _ in FENCE.findall(page.read_text(encoding="utf-8"))}
    assert languages <= LANGUAGES


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(app)
    group.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_exist(page: Path) -> None:
    """A command in a sentence may leave arguments out, so that its options are looked up."""
    group: Any = typer.main.get_command(app)
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for span in SPAN.findall(text):
        name, *arguments = shlex.split(span)
        if not name.startswith("-"):
            known = {
                option for parameter in group.commands[name].params for option in parameter.opts
            }
            assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known, span


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "lmms_eval.md"], ids=lambda page: page.name
)
def test_options_in_sentences_exist(page: Path) -> None:
    """An option by itself belongs to one of the commands; lmms-eval's page is about its own."""
    group: Any = typer.main.get_command(app)
    known = {o for c in group.commands.values() for p in c.params for o in p.opts}
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"`(--[\w-]+)", text)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_extras_and_scripts_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"tokenreduce\[([\w-]+)\]", text)) <= set(
        project["optional-dependencies"]
    )
    for script in re.findall(
        r"\b((?:benchmarks|docs|examples|tests)/[\w/-]+\.(?:py|yaml))\b", text
    ):
        assert (ROOT / script).is_file(), script


def script_lines() -> list[Any]:
    """The lines that run a script of the repository."""
    return [
        pytest.param(line, id=f"{block.id}-{i}")
        for block in fenced("sh", "text")
        for i, line in enumerate(str(block.values[0]).splitlines())
        if line.startswith("python benchmarks/")
    ]


@pytest.mark.parametrize("line", script_lines())
def test_options_of_scripts_exist(line: str) -> None:
    script, *arguments = shlex.split(line)[1:]
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source, (script, option)


@pytest.mark.parametrize(
    "block", [b for b in fenced("sh") if not any(word in str(b.values[0]) for word in INSTALLS)]
)
def test_shell_blocks_run(block: str, tmp_path: Path) -> None:
    for folder in ("examples", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    testbed.example_image().save(tmp_path / "picture.png")
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
