"""A few random calls of each compiled backend against the reference, each in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulated import build

ROOT = Path(__file__).parents[2]
CALLS = {"interpreter": 150, "emulated": 300}


def reason(backend: str) -> str | None:
    """Why a backend cannot run here."""
    if backend == "emulated":
        return build.missing_reason()
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", CALLS)
def test_random_calls(backend: str) -> None:
    if reason(backend):
        pytest.skip(str(reason(backend)))
    command = [sys.executable, "-m", "tests.differential", "--backend", backend, "--calls", str(CALLS[backend]), "--seed", "11"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert ": 0 missed" in done.stdout


def test_random_calls_of_the_reference() -> None:
    from tests.differential.run import run

    assert run("reference", 5, range(300)) == 0


@pytest.mark.skipif(reason("interpreter") is not None, reason=str(reason("interpreter")))
def test_every_setting_is_drawn() -> None:
    from dyrate_kernels.triton_kernels import plan
    from tests.differential.backends import SETTINGS

    switches = {field.name for field in dataclasses.fields(plan.Settings) if isinstance(field.default, bool)}
    assert {field.name for field in dataclasses.fields(plan.Settings)} == switches | set(SETTINGS)
