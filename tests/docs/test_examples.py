"""Every Python and YAML block of the README and the docs runs; generated parts are up to date."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenreduce as tr
from tokenreduce import hookspecs
from tokenreduce.plugins import installed
from tokenreduce_integrations.evaluation.planning import load_plan

ROOT = Path(__file__).resolve().parents[2]
PYTHON = re.compile(r"from |import |tr\.")
#: Executed notebooks have a test of their own: their cells build on each other.
NOTEBOOKS = {path.stem for path in (ROOT / "examples/notebooks").glob("*.ipynb")}
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.stem not in NOTEBOOKS),
]


def blocks(language: str) -> list[Any]:
    """The fenced blocks of a language, as parameters named after their page and order."""
    found = []
    for page in PAGES:
        texts = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
        found += [pytest.param(text, id=f"{page.name}-{i}") for i, text in enumerate(texts)]
    return found


def file_name(block: str) -> str:
    """The name of the file that a block says it is, or an empty string."""
    found = re.match(r"# (\w+\.(?:py|yaml))\b", block)
    return found[1] if found else ""


@pytest.mark.parametrize("block", [b for b in blocks("python") if not file_name(str(b.values[0]))])
def test_python_blocks_run(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block, "<block>", "exec"), {"__name__": "block"})


def test_plugin_files_make_a_plugin(tmp_path: Path) -> None:
    texts = [str(b.values[0]) for language in ("python", "yaml") for b in blocks(language)]
    files = {file_name(text): text for text in texts if file_name(text)}
    assert files
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    plugins = [Path(name).stem for name, text in files.items() if "hookimpl" in text]
    pipelines = [name for name in files if name.endswith(".yaml")]
    assert pipelines
    check = (
        "import importlib, sys; from tokenreduce.plugins import installed; "
        f"plugins = [importlib.import_module(n) for n in {plugins!r}]; "
        "assert 'torch' not in sys.modules; "
        "statuses = [installed().load(p.__name__, p) for p in plugins]; "
        "assert all(s.state == 'loaded' for s in statuses), statuses; "
        "from tokenreduce.testing import run_checks; "
        "names = [r.split(' ', 1)[1] for s in statuses for r in s.registered]; "
        "failed = [r for n in names for r in run_checks(n) if not r.ok]; "
        "assert names and not failed, failed; "
        "from tokenreduce import load_pipeline; "
        f"assert all(load_pipeline(p).stages for p in {pipelines!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if not file_name(str(b.values[0]))])
def test_yaml_blocks_parse(block: str, tmp_path: Path) -> None:
    if "sweep" in yaml.safe_load(block):
        (tmp_path / "sweep.yaml").write_text(block, encoding="utf-8")
        assert load_plan([str(tmp_path / "sweep.yaml")]).entries
        return
    assert tr.load_pipeline(yaml.safe_load(block)).stages


@pytest.mark.parametrize("block", blocks("json"))
def test_json_blocks_parse(block: str) -> None:
    assert json.loads(block)


@pytest.mark.parametrize("block", blocks("toml"))
def test_toml_blocks_parse(block: str) -> None:
    assert tomllib.loads(block)


@pytest.mark.parametrize("block", [b for b in blocks("text") if PYTHON.match(str(b.values[0]))])
def test_python_that_is_not_run_compiles_and_imports(block: str) -> None:
    """Such blocks need a model of the hub, or a folder that an evaluation wrote."""
    imports = [n for n in ast.parse(block).body if isinstance(n, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), "<block>", "exec"), {})


def test_generated_parts_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_cards_cite_the_papers_of_the_registry() -> None:
    for record in installed().strategies.values():
        page = ROOT / f"docs/strategies/{record.name}.md"
        if record.paper and page.exists():
            cited = re.findall(r"```bibtex\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
            assert any(record.paper in entry for entry in cited), record.name


def test_links_to_arxiv_are_of_papers_in_the_registry() -> None:
    papers = {record.paper for record in installed().strategies.values()}
    for page in PAGES:
        linked = re.findall(r"arxiv\.org/\w+/([^\s)]+)", page.read_text(encoding="utf-8"))
        assert set(linked) <= papers, page


def test_every_hook_is_documented() -> None:
    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    for hook in (name for name in vars(hookspecs) if name.startswith("register_")):
        assert f"`{hook}(register)`" in text


def test_pictures_are_in_markdown() -> None:
    """MkDocs neither checks nor resolves those of HTML."""
    for page in PAGES:
        assert "<img" not in page.read_text(encoding="utf-8"), page


def test_links_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target
