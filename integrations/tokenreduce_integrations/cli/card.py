"""A strategy's documentation and options, read from its source.

Importing a strategy imports torch, which takes seconds; its source says the same at once.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tokenreduce.plugins import installed

_ARGUMENT = re.compile(r"^(?P<indent> +)\*{0,2}(?P<name>\w+)(?: \([^)]*\))?: (?P<text>.+)$")


@dataclass(frozen=True)
class Option:
    """One option of a strategy.

    Attributes:
        name: of the field.
        type: its annotation.
        default: the default as written; empty where it must be given.
        help: what the docstring says of it.
    """

    name: str
    type: str
    default: str
    help: str


@dataclass(frozen=True)
class Card:
    """What the source of a strategy says.

    Attributes:
        documentation: the docstring of the module, or of the class where that is the fuller one.
        options: the fields of the class and of those it derives from, the nearest last.
    """

    documentation: str = ""
    options: tuple[Option, ...] = ()


def read_card(target: str) -> Card:
    """Read the card of ``"module:Class"``; empty where there is no source to read."""
    module_name, _, class_name = target.partition(":")
    tree = _source_of(module_name)
    found = None if tree is None else _class_in(tree, class_name)
    if tree is None or found is None:
        return Card()
    texts = [ast.get_docstring(found) or ""]
    targets = (record.target for record in installed().strategies.values())
    # Where several strategies share a module, its docstring is not about one of them.
    if sum(other.partition(":")[0] == module_name for other in targets) <= 1:
        texts.append(ast.get_docstring(tree) or "")
    options: dict[str, Option] = {}
    for node in reversed(list(_ancestry(module_name, found))):
        for option in _own_options(node):
            # A field stays where its first class put it, and says what the nearest one says.
            inherited = options.get(option.name)
            text = option.help or (inherited.help if inherited else "")
            options[option.name] = Option(option.name, option.type, option.default, text)
    return Card(documentation=max(texts, key=len), options=tuple(options.values()))


@cache
def _source_of(module_name: str) -> ast.Module | None:
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_source"):
        return None
    try:
        source = spec.loader.get_source(module_name)
        return None if source is None else ast.parse(source)
    except (ImportError, SyntaxError):
        return None


def _class_in(tree: ast.Module, name: str) -> ast.ClassDef | None:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    return None


def _ancestry(module_name: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """The class and those that it derives from, as far as their source can be found."""
    yield node
    tree = _source_of(module_name)
    if tree is None:
        return
    imported = {
        alias.asname or alias.name: (statement.module, alias.name)
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.level == 0
        for alias in statement.names
    }
    for base in node.bases:
        if not isinstance(base, ast.Name):
            continue
        home, name = imported.get(base.id, (module_name, base.id))
        other = _source_of(home)
        parent = None if other is None else _class_in(other, name)
        if parent is not None and parent is not node:
            yield from _ancestry(home, parent)


def _own_options(node: ast.ClassDef) -> Iterator[Option]:
    explained = _arguments(ast.get_docstring(node) or "")
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        annotation = ast.unparse(statement.annotation)
        if "ClassVar" in annotation:
            continue
        name = statement.target.id
        default = "" if statement.value is None else ast.unparse(statement.value)
        yield Option(name, annotation, default, explained.get(name, ""))


def _arguments(docstring: str) -> dict[str, str]:
    """What the section ``Args:`` or ``Attributes:`` of a docstring says of each name."""
    explained: dict[str, str] = {}
    current, indent, inside = "", "", False
    for line in inspect.cleandoc(docstring).splitlines():
        if re.fullmatch(r"\w+:", line):
            inside, current = line in ("Args:", "Attributes:"), ""
            continue
        if not inside:
            continue
        if line and not line.startswith(" "):
            inside = False
            continue
        match = _ARGUMENT.match(line)
        if match and (not indent or match["indent"] == indent):
            indent, current = match["indent"], match["name"]
            explained[current] = match["text"]
        elif current and line.strip():
            explained[current] += f" {line.strip()}"
    return explained
