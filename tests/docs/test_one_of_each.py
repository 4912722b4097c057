"""Helpers of the whole package stand once."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def parsed(folder: str) -> list[tuple[str, ast.AST]]:
    return [
        (str(path.relative_to(ROOT)), node)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.Call | ast.Constant | ast.Tuple)
    ]


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    for folder in folders:
        yield from parsed(folder)


def holding(found: Callable[[ast.AST], bool], *folders: str) -> set[str]:
    """The files in which a node is found."""
    return {path for path, node in nodes(*folders) if found(node)}


def defines(*names: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.FunctionDef) and node.name in names


def calls(*names: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Call) and ast.unparse(node.func) in names


def is_text(*texts: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Constant) and node.value in texts


@pytest.mark.parametrize(
    ("name", "found", "files"),
    [
        ("the copy bandwidth", defines("copy_bandwidth"), {"dyrate_kernels/measuring/timing.py"}),
        ("bytes for reading", is_text("KiB"), {"dyrate_kernels/units.py"}),
        ("evenly spaced tokens", defines("evenly_spaced", "evenly"), {"dyrate_kernels/spacing.py"}),
        # a predictor is two files, which no one call can replace
        ("files that take the place of others", calls("os.replace"), {"dyrate_kernels/files.py", "dyrate_kernels/predictor.py"}),
        (
            "whether Triton interprets",
            lambda node: calls("os.environ.get", "os.getenv")(node) and is_text("TRITON_INTERPRET")(node.args[0]),
            {"triton_kernels/__init__.py"},
        ),
        ("the kinds of retention", lambda node: isinstance(node, ast.Tuple) and ast.unparse(node) == "('recoverable', 'evict', 'pool')",
         {"dyrate_kernels/retention.py"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_stands_once(name, found, files):
    assert holding(found, "dyrate_kernels", "triton_kernels", "bench") == files


def test_json_files_are_written_whole():
    def is_write(node: ast.AST) -> bool:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            return False
        return ast.unparse(node.func) == "json.dump" or (node.func.attr == "write_text" and "json.dumps" in ast.unparse(node))

    allowed = {"bench/choose_backend.py"}  # a device's file in the source tree, by hand, under git
    assert holding(is_write, "dyrate_kernels", "triton_kernels", "bench") <= allowed


def test_one_trip_wire_says_what_would_wait_for_a_device():
    named = {path.name for path in (ROOT / "tests").rglob("*.py") if "_local_scalar_" + "dense" in path.read_text(encoding="utf-8")}
    assert named == {"host_sync.py"}


def test_the_package_knows_nothing_of_the_scripts_of_a_checkout():
    names = re.compile(r"^\s*(?:from|import) (bench|tools|tests|examples)\b", re.MULTILINE)
    assert [path for path in (ROOT / "dyrate_kernels").rglob("*.py") if names.search(path.read_text(encoding="utf-8"))] == []


def test_no_two_classes_of_methods_or_models_bear_one_name():
    """``AIM`` is a policy and a reducer, ``DyRate`` a policy and was a model for lmms-eval: the classes have names of their own."""
    found: dict[str, list[str]] = {}
    for folder in ("policies", "vision", "evaluation", "families", "patching"):
        for path in (ROOT / "dyrate_kernels" / folder).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in found.items() if len(files) > 1} == {}
