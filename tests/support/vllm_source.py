"""vLLM as it is written: what classes and functions are called and take, without importing it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """The files of a release.

    Attributes:
        root: the folder of the package ``vllm``.
    """

    root: Path

    @classmethod
    def find(cls) -> Source:
        """That in the folder ``VLLM_SOURCE``, or else the installed one."""
        given = os.environ.get("VLLM_SOURCE")
        if given is not None:
            return cls(Path(given))
        found = importlib.util.find_spec("vllm")
        if found is None or found.origin is None:
            raise LookupError("vLLM is not installed, and VLLM_SOURCE names no folder")
        return cls(Path(found.origin).parent)

    @property
    def version(self) -> str:
        """The release."""
        for node in self._module("_version").body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if "version" in names and isinstance(node.value, ast.Constant):
                    return str(node.value.value)
        raise LookupError("no version is written down")

    @functools.cache  # noqa: B019 - a release has some dozen modules that are asked about
    def _module(self, module: str) -> ast.Module:
        file = self.root.joinpath(*module.split(".")).with_suffix(".py")
        return ast.parse(file.read_text(encoding="utf-8"))

    def definition(self, name: str) -> Definition:
        """A class or function.

        Args:
            name: as in ``multimodal.registry:MultiModalRegistry.register_processor``.

        Raises:
            LookupError: if it is not there.
        """
        module, _, path = name.partition(":")
        body: list[ast.stmt] = self._module(module).body
        for part in path.split("."):
            found = [node for node in body if isinstance(node, Definition) and node.name == part]
            if not found:
                raise LookupError(f"{name}: there is no {part!r}")
            body = found[-1].body
        return found[-1]

    def parameters(self, name: str) -> tuple[str, ...]:
        """What a function takes, or the fields of a class, in order."""
        node = self.definition(name)
        if isinstance(node, ast.ClassDef):
            fields = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
            return tuple(field.id for field in fields if isinstance(field, ast.Name))
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return tuple(each.arg for each in given if each.arg != "self")

    def keywords(self, module: str, method: str) -> list[frozenset[str]]:
        """How a method is called in a module: the keywords of each call."""
        calls = (node for node in ast.walk(self._module(module)) if isinstance(node, ast.Call))
        return [
            frozenset(keyword.arg or "**" for keyword in call.keywords)
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == method
        ]

    def names(self, name: str) -> frozenset[str]:
        """Attributes that a class, function or module reads or sets, and names that it uses."""
        node = self.definition(name) if ":" in name else self._module(name)
        walked = list(ast.walk(node))
        attributes = {each.attr for each in walked if isinstance(each, ast.Attribute)}
        return frozenset(attributes | {each.id for each in walked if isinstance(each, ast.Name)})
