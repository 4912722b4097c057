"""Compiles the kernels of ``csrc/`` for the CPU (``csrc/emulation``), in three variants, once for each state of the sources.

    plain      the module that most tests use
    sanitized  address and undefined-behaviour sanitizers; its process needs ``environment("sanitized")``
    races      every access to memory is checked for a barrier between it and those that conflict with it

What was compiled lies in the temporary folder under a name made from the sources, the flags and the compiler, so parallel workers and later
sessions find it; a lock sees to it that only one of them compiles.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = Path(__file__).parent
NAME = "_emulated"  # as binding.cpp calls the module
NOT_EMULATED = ("probe.cu",)  # asks the CUDA runtime


@dataclass(frozen=True)
class Variant:
    """Flags of all files, of those with kernels, of linking; files beside those of ``csrc``."""

    flags: tuple[str, ...] = ()
    kernel_flags: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()


_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
VARIANTS = {
    "plain": Variant(),
    # not optimised: half of the time to compile, which is more than its tests then take longer
    "sanitized": Variant(flags=(*_SANITIZE, "-O0", "-g1", "-fno-omit-frame-pointer"), link=_SANITIZE),
    "races": Variant(
        flags=("-g1", "-DDYRATE_EMULATE_RACES"), kernel_flags=("-fsanitize=thread",), link=("-ldl",), extra=("emulation/races.cpp",)
    ),
}


@functools.cache
def compiler() -> str | None:
    return shutil.which("g++")


@functools.cache
def missing_reason() -> str | None:
    """Why nothing can be compiled here, or None."""
    if sys.platform != "linux":
        return f"the emulation is made for Linux, this is {sys.platform}"
    if compiler() is None:
        return "there is no g++ on PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed (it is in the extra `test`)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "this Python has no headers (Python.h)"
    return None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
    return done.stdout


@functools.cache
def _compiler_version() -> str:
    return _run([str(compiler()), "--version"]) + _run([str(compiler()), "-dumpmachine"])


def _digest(sources: Path, files: list[Path], *more: str) -> str:
    """Of the sources with their names, and of what else decides the result."""
    made = hashlib.sha256(repr((_compiler_version(), sys.version, *more)).encode())
    for file in sorted(files):
        made.update(f"{file.relative_to(sources)}\0".encode() + file.read_bytes() + b"\0")
    return made.hexdigest()[:20]


def _home() -> Path:
    """A folder of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"dyrate-emulated-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise RuntimeError(f"{folder} belongs to somebody else: set TMPDIR to another folder")
    return folder


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    import fcntl

    with open(_home() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base_flags(sources: Path) -> list[str]:
    return ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DDYRATE_EMULATE", f"-I{sources}"]


def _make(target: Path, compile_commands: list[list[str]], link: list[str]) -> None:
    """Compiles side by side into a folder next to the target, links, and moves the result into place."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [str(Path(folder, f"{number}.o")) for number in range(len(compile_commands))]
        jobs = [[*command, "-o", name] for command, name in zip(compile_commands, objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4)) as pool:
            list(pool.map(_run, jobs))
        made = Path(folder, target.name)
        _run([str(compiler()), *objects, *link, "-o", str(made)])
        os.replace(made, target)


def module_path(variant: str = "plain", sources: Path = CSRC) -> Path:
    """The compiled module; compiles it where nobody has. RuntimeError with the compiler's words where that fails."""
    how = VARIANTS[variant]
    import pybind11

    includes = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
    files = [path for path in sources.rglob("*") if path.suffix in (".h", ".cu", ".cpp")]
    digest = _digest(sources, files, repr(how), pybind11.__version__, *_base_flags(Path()))
    target = _home() / f"{variant}-{digest}" / (NAME + importlib.machinery.EXTENSION_SUFFIXES[0])
    if target.is_file():
        return target
    with _alone(f"{variant}-{digest}"):
        if not target.is_file():
            target.parent.mkdir(exist_ok=True)
            kernels = [file for file in sorted(sources.glob("*.cu")) if file.name not in NOT_EMULATED]
            commands = []
            for file in [*kernels, sources / "binding.cpp", *(sources / name for name in how.extra)]:
                flags = [*_base_flags(sources), *how.flags, *(how.kernel_flags if file in kernels else ())]
                commands.append([str(compiler()), *flags, *includes, "-x", "c++", "-c", str(file)])
            _make(target, commands, ["-shared", *how.link])
    return target


def program_path(source: Path, variant: str = "plain", sources: Path = CSRC, headers: tuple[str, ...] = ("simt.h",)) -> Path:
    """A program of one file that includes these ``headers``, compiled as the module's kernels are."""
    how = VARIANTS[variant]
    files = [*(sources / name for name in headers), *(sources / "emulation").iterdir()]
    digest = _digest(sources, files, repr(how), *_base_flags(Path()), source.read_text())
    target = _home() / f"{variant}-{digest}" / source.stem
    if target.is_file():
        return target
    with _alone(f"{variant}-{digest}"):
        if not target.is_file():
            target.parent.mkdir(exist_ok=True)
            flags = [*_base_flags(sources), *how.flags]
            commands = [[str(compiler()), *flags, *how.kernel_flags, "-c", str(source)]]
            commands += [[str(compiler()), *flags, "-c", str(sources / name)] for name in how.extra]
            _make(target, commands, list(how.link))
    return target


def load(variant: str = "plain", sources: Path = CSRC) -> ModuleType:
    """The module, imported."""
    path = module_path(variant, sources)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(variant: str) -> dict[str, str]:
    """Returns what a process needs in its environment to load the variant."""
    if variant != "sanitized":
        return {}
    # all memory of the process gets red zones, that of torch's tensors too; libstdc++ first of all, or its exceptions are not found
    libraries = [_run([str(compiler()), f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def explain(message: str) -> str:
    """A message of the emulation with file and line where it has ``library.so+0x1234``."""
    import re

    def line(found: re.Match[str]) -> str:
        done = subprocess.run(["addr2line", "-s", "-i", "-e", found[1], found[2]], capture_output=True, text=True)
        return " < ".join(done.stdout.split()[:3]) or found[0]

    return re.sub(r"(/\S+)\+(0x[0-9a-f]+)", line, message) if shutil.which("addr2line") else message
