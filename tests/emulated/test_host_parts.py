"""The host parts of the CUDA backend (``csrc/plan.h``, ``csrc/checks.h``) in a program of their own, under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.emulated import build

pytestmark = pytest.mark.skipif(build.missing_reason() is not None, reason=str(build.missing_reason()))

SOURCE = Path(__file__).with_name("host_parts.cpp")
HEADERS = ("calls.h", "checks.h", "plan.h", "simt.h")
TESTS = 10


def run(sources: Path = build.CSRC) -> subprocess.CompletedProcess[str]:
    program = build.program_path(SOURCE, "sanitized", sources, HEADERS)
    environment = {**os.environ, "ASAN_OPTIONS": "", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program)], capture_output=True, text=True, env=environment, timeout=290)


def test_host_parts() -> None:
    done = run()
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert len(lines) == TESTS and all(line.endswith(": right") for line in lines), done.stdout
