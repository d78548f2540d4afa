"""A strategy is one file that a reader can hold in mind."""

import ast
from pathlib import Path

import pytest

import tokenreduce_strategies

FILES = sorted(Path(tokenreduce_strategies.__file__).parent.glob("[!_]*.py"))
LONGEST = 150


def lines_of_code(text):
    """Lines that are neither blank, comment nor docstring."""
    described = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                described |= set(range(first.lineno, first.end_lineno + 1))
    return [
        line
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in described
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_length(file):
    assert len(lines_of_code(file.read_text(encoding="utf-8"))) <= LONGEST
