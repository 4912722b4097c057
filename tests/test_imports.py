"""Imports point one way: those inside of functions and under TYPE_CHECKING count too.

What is not so yet stands in ``CIRCLES`` and ``UPWARDS``, which may only shrink: an entry that is no longer needed is a failure.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"dyrate_kernels": ROOT / "dyrate_kernels", "dyrate_kernels.triton_kernels": ROOT / "triton_kernels"}
# from the lowest layer to the highest; a module imports from its own layer and those below it. What stands in none is not ordered
LAYERS = ("ops", "policies", "generation", "engines", "patching")
GENERATION = (
    *("index", "inference", "heads", "kv_store", "layout", "attend", "cpu_step", "pool", "turn", "passes", "ranking", "decide", "apply"),
    *("record", "aside", "score_layer", "session"),
)
CIRCLES: list[set[str]] = []
UPWARDS: set[tuple[str, str]] = set()


def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``dyrate_kernels.``; the package itself is ``""``."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name.removeprefix("dyrate_kernels").removeprefix("."): path for name, path in found.items()}


@functools.cache
def parsed(path: Path) -> list[ast.AST]:
    """Every node of a file."""
    return list(ast.walk(ast.parse(path.read_text())))


def imported(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """Yields what a module imports, wherever in it: full name of a module, and a name in it or None."""
    whole = ".".join(filter(None, ("dyrate_kernels", name)))
    package = (whole if path.name == "__init__.py" else whole.rpartition(".")[0]).split(".")
    for node in parsed(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else []), *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        each = {f"{base}.{part}" if part and short(f"{base}.{part}") in known else base for base, part in imported(name, path)}
        found[name] = {short(other) for other in each if other.startswith("dyrate_kernels.") and short(other) in known} - {name}
    return found


def short(name: str) -> str:
    return name.removeprefix("dyrate_kernels.")


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that reach each other."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen, waiting = set(), [*edges[start]]
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                waiting += edges.get(each, ())
        reach[start] = seen
    found: list[set[str]] = []
    for name in edges:
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and circle not in found:
            found.append(circle)
    return found


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    return graph()


def layer(name: str) -> int | None:
    first = name.partition(".")[0]
    return LAYERS.index(first) if first in LAYERS else None


def test_no_circle(edges):
    found = circles(edges)
    assert sorted(map(sorted, found)) == sorted(map(sorted, CIRCLES)), "a circle that is gone must leave CIRCLES; no other may come"
    assert not any(each.startswith(("generation", "patching", "ops")) for circle in found for each in circle)


def test_each_layer_imports_only_those_below(edges):
    upwards = {
        (name, other)
        for name, others in edges.items()
        for other in others
        if layer(name) is not None and layer(other) is not None and layer(other) > layer(name)
    }
    assert upwards == UPWARDS


def test_each_module_of_a_generation_imports_only_those_above_it(edges):
    here = {name for name in edges if name.startswith("generation.")}
    assert here == {f"generation.{name}" for name in GENERATION}
    for place, name in enumerate(GENERATION):
        inside = {other.removeprefix("generation.") for other in edges[f"generation.{name}"] if other.startswith("generation")}
        assert inside <= {*GENERATION[:place]}, name


def test_a_generation_imports_no_transformers(edges):
    """Nor does anything that it imports."""
    known, seen, waiting = modules(), set(), [name for name in edges if name.startswith("generation")]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += edges[name]
    assert "generation.session" in seen and "policies.base" in seen
    for name in sorted(seen - {"policies"}):
        assert not any(base.partition(".")[0] == "transformers" for base, _ in imported(name, known[name])), name


def test_only_its_own_module_assigns_the_attributes_of_a_session():
    """``session.x = ..`` and ``setattr(session, ..)`` stand nowhere but in ``generation/session.py``."""
    for name, path in modules().items():
        for node in parsed(path):
            targets = (
                node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
            )
            for target in (each for whole in targets for each in (whole.elts if isinstance(whole, ast.Tuple) else [whole])):
                if isinstance(target, ast.Attribute):
                    assert "session" not in ast.unparse(target.value).split("."), f"{name}: {ast.unparse(node)}"


def test_one_module_asks_the_policy():
    for name, path in modules().items():
        if name.startswith(("generation", "patching")) and name != "generation.decide":
            for node in parsed(path):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "decide":
                    assert "policy" not in ast.unparse(node.func.value), f"{name}: {ast.unparse(node)}"


def test_one_module_selects_by_rank():
    """``kv_store`` lists rows by the same operator where it moves them; a fused step (``attend``) is called by ``decide`` alone."""
    found = {
        (name, node.func.attr)
        for name, path in modules().items()
        if name.startswith(("generation", "patching"))
        for node in parsed(path)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("select_tokens", "predict_rate", "keep_count") or ast.unparse(node.func) == "attention.step"
    }
    decides = {("generation.decide", name) for name in ("select_tokens", "predict_rate", "keep_count", "step")}
    assert found == decides | {("generation.kv_store", "select_tokens")}


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
