"""The emulated machine itself (``csrc/emulation``): toy kernels that are right, and one for each mistake that it has to notice."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.emulated import build

pytestmark = pytest.mark.skipif(build.missing_reason() is not None, reason=str(build.missing_reason()))

TOYS = Path(__file__).with_name("toys.cpp")

# what each toy must say; those of the second table in the plain variant only
FOUND = {
    "index": "right",
    "empty grid": "fails: grid 5 x 0 x 3: expected",
    "after a failure": "right",
    "sum": f"same: {9 * 499500} 499500",
    "collectives": "same: 64 -7",
    "unset shared memory": "same: -1 1",
    "one thread leaves": "threads 0 .. 36: at sync (toys.cpp:",
    "two barriers": "threads 32 .. 63: at sync (toys.cpp:",
    "half a warp shuffles": "threads 0 .. 15: at shuffle_xor (toys.cpp:",
    "two collectives": "the lanes of warp 0 meet at different places: shuffle_xor (toys.cpp:",
    "shuffle against barrier": "threads 3 .. 3: at sync (toys.cpp:",
    "wrong lane": "asks for lane 32 of 32",
    "misaligned": "is not a multiple of 16",
}
BY_ORDER = {
    "no barrier before read": "order matters",
    "no barrier before overwrite": "order matters",
    "last by index": "order matters",
    "early count": "order matters",
    "shuffle is no barrier": "same: 31 30",  # on a CPU it is one
}
RACES = {
    "no barrier before read": ("shared memory", "reads at", "writes at"),
    "no barrier before overwrite": ("shared memory", "reads at", "writes at"),
    "shuffle is no barrier": ("shared memory", "reads at", "writes at"),
    "last by index": ("global memory", "of block number 5 reads at"),
    "early count": ("global memory", "thread 40 of block number"),
}


def run(variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": ""}
    return subprocess.run([str(build.program_path(TOYS, variant)), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("variant", ["plain", "sanitized", "races"])
def test_toys(variant: str) -> None:
    done = run(variant)
    assert done.returncode == 0, done.stderr[-4000:]
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert set(said) == {*FOUND, *BY_ORDER}
    for name, want in (FOUND if variant == "races" else FOUND | BY_ORDER).items():
        assert want in said[name], f"{name}: {said[name]}"
    if variant == "races":
        for name, parts in RACES.items():
            assert "race on byte" in said[name] and all(part in said[name] for part in parts), f"{name}: {said[name]}"


def test_a_race_names_its_lines() -> None:
    said = [line for line in run("races").stdout.splitlines() if line.startswith("shuffle is no barrier")]
    assert build.explain(said[0]).count("toys.cpp:") == 2


@pytest.mark.parametrize(
    "name, words",
    [
        ("beyond shared", "heap-buffer-overflow"),
        ("beyond array", "index 32 out of bounds"),
        ("beyond global", "heap-buffer-overflow"),
    ],
)
def test_sanitizers_see_the_kernels_memory(name: str, words: str) -> None:
    done = run("sanitized", name)
    assert done.returncode != 0 and words in done.stderr
    assert "toys.cpp" in done.stderr
