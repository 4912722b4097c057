"""Runs the case files of this folder and the tests of tests/ops: the CUDA kernels on the CPU, plainly and under two detectors, each in a
process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated import build
from tests.ops import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = [*sorted(HERE.glob("cases_*.py")), *(ROOT / name for name in backends.files("emulated"))]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(build.missing_reason() is not None, reason=str(build.missing_reason()))
@pytest.mark.parametrize("variant", build.VARIANTS)
def test_cases(variant: str) -> None:
    build.module_path(variant)
    environment = {**os.environ, **build.environment(variant), "DYRATE_EMULATED": variant, "OMP_NUM_THREADS": "1"}
    files = [str(file.relative_to(ROOT)) for file in FILES]
    command = [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", "--timeout", "300"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=990)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
