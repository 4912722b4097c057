"""Runs the tests of a family on a copy of the repository with one fault at a time.

What takes long to import is imported once: each run is a fork of this process, whose Python finds the copy and nothing of the checkout.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.abc
import importlib.util
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.fault import ROOT, Family, Fault

PACKAGE = "dyrate_kernels.triton_kernels"
KEPT = ("tests", "dyrate_kernels", "bench")  # modules that a fork imports anew


class _Copy(importlib.abc.MetaPathFinder):
    """Finds the Triton backend in the copy, whose folder has another name than the package."""

    def __init__(self, copy: Path) -> None:
        self.folder = copy / "triton_kernels"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != PACKAGE:
            return None
        return importlib.util.spec_from_file_location(
            name, self.folder / "__init__.py", submodule_search_locations=[str(self.folder)]
        )  # fmt: skip


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """The repository's files in a folder that goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="dyrate-faults-") as folder:
        copy = Path(folder, "repository")
        listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if name.startswith(("tests/", "dyrate_kernels/", "triton_kernels/", "csrc/", "pyproject.toml")) and (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        build_info = ROOT / "dyrate_kernels" / "_build_info.json"
        if build_info.is_file():
            shutil.copy(build_info, copy / "dyrate_kernels")
        yield copy


def preload(family: Family) -> None:
    """Imports what every fork needs and no fault changes."""
    if family.backend == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    if family.backend == "interpreter":
        import triton  # noqa: F401
    else:
        import pybind11  # noqa: F401


def run(family: Family, fault: Fault | None, copy: Path, seconds: int) -> tuple[bool, str]:
    """(whether a test failed, what was seen) with the fault in the copy; None makes a few random calls without one."""
    before = None
    if fault is not None:
        path = copy / fault.file
        before = path.read_text()
        path.write_text(fault.applied(before))
    try:
        for step in steps(family, fault):
            failed, seen = _forked(family, step, copy, seconds, fault is not None)
            if failed:
                return True, f"{' '.join(map(str, step))}: {seen}"
        return False, ""
    finally:
        if before is not None:
            path.write_text(before)


def steps(family: Family, fault: Fault | None) -> list[tuple[str, str]]:
    """Returns what runs, one after the other, until something fails: ``("calls" | "cases", variant of the emulation)``."""
    if fault is None:
        return [("calls", "plain")]
    return [("cases", "races")] if fault.races else [("calls", "plain"), ("cases", "plain")]


def _forked(family: Family, step: tuple[str, str], copy: Path, seconds: int, planted: bool) -> tuple[bool, str]:
    log = copy.parent / "log"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # of a busy machine's wall clock a test may take far more
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True), sys.stderr
            code = _child(family, step, copy, planted)
        except BaseException as error:
            os.write(1, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return True, f"no end after {seconds} s" if name in ("SIGXCPU", "SIGKILL") else f"ended by {name}"
    return status != 0, _told(log.read_text(errors="replace")) if status else ""


def _told(text: str) -> str:
    """The line of a log that says what failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("FAILED", "miss:", "ERROR", "error:"):
        for line in lines:
            if line.startswith(mark) or (mark == "error:" and mark in line):
                return line[:200]
    return lines[-1][:200] if lines else "no output"


def _child(family: Family, step: tuple[str, str], copy: Path, planted: bool) -> int:
    kind, variant = step
    for name in [name for name in sys.modules if name.split(".")[0] in KEPT]:
        del sys.modules[name]
    os.chdir(copy)
    here = {str(ROOT), "", "."}
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in here)]
    sys.path_importer_cache.clear()
    sys.meta_path.insert(0, _Copy(copy))
    sys.dont_write_bytecode = True
    if family.backend == "emulated":
        os.environ["DYRATE_EMULATED"] = variant
        # what is compiled goes with the copy
        os.environ["TMPDIR"] = str(copy.parent)
        tempfile.tempdir = None
        _reuse_objects(copy, family.compiled)
    import dyrate_kernels

    assert Path(str(dyrate_kernels.__file__)).is_relative_to(copy), "the fork found the checkout"
    if kind == "calls":
        from tests.differential.run import run as differential

        calls = family.calls if planted else family.calls // 8
        return int(differential(family.backend, 3, range(calls), family.operators, stop=True) > 0)
    import pytest

    return int(pytest.main([*family.cases, "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]))


def _reuse_objects(copy: Path, again: tuple[str, ...]) -> None:
    """Of ``csrc`` only the files ``again`` are compiled for a fault, if they or what they include has changed."""
    from tests.emulated import build

    folder = copy.parent / "objects"
    folder.mkdir(exist_ok=True)
    compile_and_link = build._run

    def compiled(command: list[str]) -> str:
        if "-c" not in command:
            return compile_and_link(command)
        place = command.index("-o") + 1
        target, plain = command[place], command[: place - 1] + command[place + 1 :]
        file = Path(plain[-1])
        text = "".join(path.read_text() for path in sorted(_included(file, {}))) if file.name in again else ""
        kept = folder / f"{hashlib.sha256((repr(plain) + text).encode()).hexdigest()[:24]}.o"
        if kept.is_file():
            shutil.copy(kept, target)
        else:
            compile_and_link(command)
            shutil.copy(target, kept)
        return ""

    build._run = compiled


def _included(file: Path, seen: dict[Path, None]) -> dict[Path, None]:
    """A source file and all that it includes of its folder and of ``csrc``."""
    seen[file] = None
    for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
        for found in (file.parent / name, file.parent.parent / name):
            if found.is_file() and found not in seen:
                _included(found, seen)
    return seen
