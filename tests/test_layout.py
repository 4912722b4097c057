"""Functions stay short enough to be read at once: 80 lines of code, without signature, docstring, comments and blank lines.

Kernels (``@triton.jit``) are excused: what they share lives in registers, and a part of its own is one only where it pays.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("bench", "dyrate_kernels", "examples", "tests", "tools", "triton_kernels")
LONGEST = 80


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of a function's body that hold code; lines: of the file."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    if not body:
        return 0
    end = function.end_lineno or body[0].lineno
    return sum(bool(text := line.strip()) and not text.startswith("#") for line in lines[body[0].lineno - 1 : end])


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).partition("(")[0] == "triton.jit" for decorator in function.decorator_list)


def long_functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and lines of code of each function that is too long."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_kernel(node):
            count = code_lines(node, lines)
            if count > LONGEST:
                yield node.name, count


@pytest.mark.parametrize("place", [*PLACES, "setup.py"])
def test_functions_stay_under_eighty_lines_of_code_but_kernels(place):
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    found = [f"{path.relative_to(ROOT)}: {name} has {count}" for path in files for name, count in long_functions(path.read_text())]
    assert found == [], f"more than {LONGEST} lines of code: split them by what they do"


def test_a_long_function_is_found_and_a_kernel_is_not():
    body = '    """Two\n    lines."""\n\n' + "    # a comment\n    x = 1\n" * LONGEST
    assert list(long_functions(f"def short(\n    x,\n):\n{body}")) == []
    assert list(long_functions(f"def long():\n{body}    return x\n")) == [("long", LONGEST + 1)]
    assert list(long_functions(f"class A:\n  def long(self):\n{body}    return x\n")) == [("long", LONGEST + 1)]
    assert list(long_functions(f"@triton.jit\ndef long():\n{body}    return x\n")) == []
