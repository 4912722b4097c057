"""Programmatic dependent launch: every kernel of the Triton backend waits for the launches before it; read from the package's source.

``tests/ahead_of_time`` looks at the same in what was compiled.
"""

from __future__ import annotations

import ast
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import dyrate_kernels.triton_kernels as package
from dyrate_kernels import devices
from dyrate_kernels.triton_kernels import launch as launching

FOLDER = Path(package.__file__).parent
MEMORY = ("load", "store", "atomic", "descriptor", "make_block_ptr", "inline_asm")  # beginnings of what touches memory in triton.language
AHEAD = "fetch_ahead"  # device functions that may run before the wait begin so: they fetch weights into a cache


def is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def read(sources: list[str]) -> tuple[dict[str, ast.FunctionDef], set[str]]:
    """(the package's ``triton.jit`` functions, the names of those that its other code speaks of: the launched ones)."""
    trees = [ast.parse(source) for source in sources]
    functions = {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and is_jit(node)}

    def names(node: ast.AST) -> set[str]:
        if isinstance(node, ast.FunctionDef) and is_jit(node):
            return set()
        own = {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
        return own.union(*map(names, ast.iter_child_nodes(node)))

    return functions, set().union(*map(names, trees)) & set(functions)


def fault(kernel: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> str | None:
    """Returns what is wrong with a launched kernel."""
    if kernel.args.args[-1].arg != "PDL":
        return "its last argument is not PDL"
    for statement in kernel.body:
        if ast.unparse(statement) == "follow(PDL)":
            return None
        for node in ast.walk(statement):
            if isinstance(node, ast.Return):
                return "it may return before it waits"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).rpartition(".")[2]
                if called.startswith(MEMORY) or (called in functions and not called.startswith(AHEAD)):
                    return f"it calls {called} before it waits"
    return "it does not wait"


def test_every_kernel_waits_for_the_launches_before_it():
    functions, launched = read([path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("**/*.py"))])
    assert len(launched) >= 11 and {name for name in functions if name.endswith("_kernel")} == launched
    found = {name: fault(functions[name], functions) for name in launched}
    assert not {name: what for name, what in found.items() if what}


@pytest.mark.parametrize(
    "body, what",
    [
        ("follow(PDL)\n    x = tl.load(p)", None),
        ("i = tl.program_id(0)\n    fetch_ahead(p)\n    follow(PDL)\n    tl.store(p, 0)", None),
        ("x = tl.load(p)\n    follow(PDL)", "it calls load before it waits"),
        ("if True:\n        tl.atomic_add(p, 1)\n    follow(PDL)", "it calls atomic_add before it waits"),
        ("part(p)\n    follow(PDL)", "it calls part before it waits"),
        ("if tl.program_id(0) == 0:\n        return\n    follow(PDL)", "it may return before it waits"),
        ("if tl.program_id(0) == 0:\n        follow(PDL)\n    tl.store(p, 0)", "it calls follow before it waits"),
        ("tl.store(p, 0)", "it calls store before it waits"),
        ("pass", "it does not wait"),
    ],
)
def test_the_rule_sees_a_kernel_that_does_not_wait(body, what):
    source = "@triton.jit\ndef {}(p, PDL: tl.constexpr):\n    {}\n"
    parts = [source.format("fetch_ahead", "pass"), source.format("part", "pass"), source.format("follow", "pass")]
    functions, launched = read(["".join(parts) + source.format("new_kernel", body) + "start(new_kernel)\n"])
    assert launched == {"new_kernel"} and fault(functions["new_kernel"], functions) == what


def test_every_launch_says_whether_it_is_a_dependent_one():
    calls = []
    for path in sorted(FOLDER.glob("**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Launch":
                calls.append(node)
    assert calls
    for call in calls:
        assert len(call.args) == 7 or "dependent" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)


@pytest.mark.parametrize(
    "name, major, shipped, overridden, want",
    [
        ("new", 9, {}, None, False),
        ("new", 9, {"dependent_launch": True}, None, True),
        ("new", 9, {"dependent_launch": True}, False, False),
        ("new", 12, {}, True, True),
        ("old", 8, {"dependent_launch": True}, None, False),
        ("old", 8, {}, True, False),
    ],
)
def test_it_is_off_unless_the_devices_file_turns_it_on(name, major, shipped, overridden, want, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name=name, major=major))
    monkeypatch.setattr(devices, "measured", lambda device_name: shipped)
    launching._dependent_launch.cache_clear()
    launching.override_dependent_launch(overridden)
    try:
        assert launching.dependent_launch(torch.device("cuda", 0)) is want
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        launching._dependent_launch.cache_clear()
        assert launching.dependent_launch(torch.device("cuda", 0)) is False
    finally:
        launching.override_dependent_launch(None)
        launching._dependent_launch.cache_clear()


def test_a_dependent_launch_tells_the_driver_and_the_kernel():
    plain, dependent = (launching.Launch(None, (1, 1, 1), (7,), 4, dependent=on) for on in (False, True))
    assert plain.rest == (7, False) and "launch_pdl" not in plain.options
    assert dependent.rest == (7, True) and dependent.options == {**plain.options, "launch_pdl": True}
