"""Writing a new plugin package: a project that installs, passes its tests, and can be edited."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Final

from tokenreduce import __version__
from tokenreduce.errors import ProjectError, did_you_mean
from tokenreduce.hookspecs import PLUGIN_API_VERSION
from tokenreduce.plugins import installed

#: What can be written, what it is called, and the registry that its name goes into.
KINDS: Final = {
    "strategy": ("A strategy", "strategies"),
    "adapter": ("A model adapter", "model_adapters"),
    "quantizer": ("A quantizer", "quantizers"),
    "neighbors": ("A nearest-neighbour backend", "neighbor_backends"),
}

#: What fits into the lines of the templates.
LONGEST_NAME: Final = 30

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_SUFFIX = ".template"


def write_project(name: str, kind: str, folder: Path) -> list[Path]:
    """Write a plugin package into a folder of its own.

    Args:
        name: of the distribution and of what it registers; the module is called the same, with
            ``_`` for ``-``.
        kind: one of :data:`KINDS`.
        folder: where the package's folder, called ``name``, is made.

    Returns:
        the files, in order.

    Raises:
        ProjectError: if the name cannot be used, there is no such kind, or the folder is there
            already or cannot be written.
    """
    if kind not in KINDS:
        raise ProjectError(f"no kind of plugin {kind!r}. {did_you_mean(kind, KINDS)}")
    module = _module_of(name, kind)
    project = folder / name
    if project.exists():
        raise ProjectError(
            f"{project} is there already, and nothing is overwritten. Choose another name, or "
            "another folder."
        )
    values = {
        "name": name,
        "module": module,
        "cls": "".join(part.capitalize() for part in name.split("-")),
        "what": KINDS[kind][0],
        "version": __version__.rpartition(".")[0],
        "api": str(PLUGIN_API_VERSION),
    }
    written = []
    try:
        for path, text in _templates(kind):
            target = project / Template(path).substitute(values)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(text).substitute(values), encoding="utf-8")
            written.append(target)
    except OSError as error:
        raise ProjectError(f"{project} cannot be written: {error}.") from error
    return sorted(written)


def _module_of(name: str, kind: str) -> str:
    """The module of a package, if nothing else is called so.

    Raises:
        ProjectError: saying what is wrong with the name.
    """
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise ProjectError(
            f"name {name!r}: at most {LONGEST_NAME} lower-case letters and digits in words joined "
            "by '-', beginning with a letter, such as 'my-strategy'."
        )
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise ProjectError(f"name {name!r}: Python itself has {module!r}. Choose another name.")
    registry = getattr(installed(), KINDS[kind][1])
    if name in registry:
        owner = registry[name].distribution
        raise ProjectError(
            f"name {name!r}: a {registry.kind} of {owner!r} is called so. Choose another name."
        )
    if find_spec(module) is not None:
        raise ProjectError(
            f"name {name!r}: a module {module!r} is installed already. Choose another name."
        )
    return module


def _templates(kind: str) -> Iterator[tuple[str, str]]:
    """Path and text of each template of a kind."""
    root = resources.files(__name__) / "templates"
    for part in ("common", kind):
        yield from _walk(root / part, "")


def _walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        # Hidden files, and one whose name is not known yet, are stored under other names.
        name = entry.name.replace("__module__", "$module")
        name = f".{name.removeprefix('dot-')}" if name.startswith("dot-") else name
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{name}/")
        elif name.endswith(_SUFFIX):
            yield prefix + name.removesuffix(_SUFFIX), entry.read_text(encoding="utf-8")
