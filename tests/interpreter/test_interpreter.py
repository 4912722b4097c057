"""Runs the case files of this folder and the tests of tests/ops in a few processes of their own, under Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def subject(file: Path) -> str:
    return file.stem.partition("_")[2]


FILES = sorted([*HERE.glob("cases_*.py"), *(ROOT / name for name in backends.files("interpreter"))], key=subject)
SUBJECTS = sorted(set(map(subject, FILES)))
PROCESSES = 4  # each starts for longer than most cases run; two workers share them more evenly than two
SHARES = [[file for file in FILES if SUBJECTS.index(subject(file)) % PROCESSES == first] for first in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("files", SHARES, ids=lambda files: files[0].stem)
def test_cases(files: list[Path]) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    named = [str(file.relative_to(ROOT)) for file in files]
    command = [sys.executable, "-m", "pytest", *named, "-q", "-p", "no:cacheprovider", "--timeout", "300"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=990)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
