"""Runs the case files of this folder in processes of their own: the CUDA kernels on the CPU, plainly and under two detectors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated import build

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = sorted(HERE.glob("cases_*.py"))


@pytest.mark.slow
@pytest.mark.skipif(build.missing_reason() is not None, reason=str(build.missing_reason()))
@pytest.mark.parametrize("variant", build.VARIANTS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_cases(file: Path, variant: str) -> None:
    build.module_path(variant)
    environment = {**os.environ, **build.environment(variant), "DYRATE_EMULATED": variant, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", str(file.relative_to(ROOT)), "-q", "-p", "no:cacheprovider", "--timeout", "300"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
