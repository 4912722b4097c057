"""Kernels that settings turn on, and paged rows, under compute-sanitizer: experiment 11. Nothing is timed, so it runs while those of the
others are built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dyrate_kernels.measuring import timing

from .runner import FAILED, NOT_REACHED, WRONG, Context, Experiment, Row

TOOLS = ("racecheck", "memcheck", "synccheck")
SKIPPED, CLEAN = "skipped", "clean"
ALONE = [sys.executable, "-m", "bench.sanitize", "--forms"]


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or where the toolkit puts it."""
    patterns = ("usr/local/cuda*/bin/compute-sanitizer", "usr/local/cuda*/compute-sanitizer/compute-sanitizer",
                "opt/nvidia/*/compute-sanitizer")  # fmt: skip
    places = [place for pattern in patterns for place in sorted(Path("/").glob(pattern))]
    return shutil.which("compute-sanitizer") or next((str(place) for place in places if os.access(place, os.X_OK)), None)


def results(output: str) -> dict:
    """The gate of what ``bench.sanitize`` printed: how many of its results are not the reference's."""
    lines = output.splitlines()
    wrong, right = (sum(line.startswith(word) for line in lines) for word in ("WRONG ", "ok "))
    return timing.correctness(0.0, results_wrong=float(wrong) if wrong or right else float("nan"))


def watch(context: Context) -> Iterator[Row]:
    """Alone first, which builds the kernels and compares every result; then under all tools at once."""
    name = "what settings turn on"
    left = max(context.left(), 5.0)
    try:
        alone = subprocess.run(
            ALONE, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=left * (0.9 if context.toy else 0.6)
        )
    except subprocess.TimeoutExpired:
        yield context.row(f"{name}: alone", None, case=name, variant="alone", verdict=NOT_REACHED, note="stopped: the time was over")
        return
    passed = results(alone.stdout)
    compared = sum(line.startswith(("ok ", "WRONG ")) for line in alone.stdout.splitlines())
    note = f"{compared} results compared"
    if alone.returncode:
        note += "; " + (alone.stderr.strip().splitlines() or ["exit status " + str(alone.returncode)])[-1][:200]
    good = passed["passed"] and not alone.returncode
    facts = {"case": name, "variant": "alone", "gate": passed, "note": note, "verdict": None if good else FAILED, "fails": not good}
    yield context.row(f"{name}: alone", None, **facts)
    program = find_sanitizer()
    why = "a rehearsal has no device to check" if context.toy else "compute-sanitizer is not installed" if program is None else None
    if why is not None:
        for tool in TOOLS:
            yield context.row(f"{name}: {tool}", None, case=name, variant=tool, verdict=SKIPPED, note=why)
        return
    assert program is not None
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"]
    running = {
        tool: subprocess.Popen(
            [program, "--tool", tool, *options, *ALONE], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for tool in TOOLS
    }  # fmt: skip
    end = time.monotonic() + max(context.left(), 5.0)
    for tool, process in running.items():
        try:
            output, _ = process.communicate(timeout=max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            yield context.row(f"{name}: {tool}", None, case=name, variant=tool, verdict=NOT_REACHED, note="stopped: the time was over")
            continue
        yield context.row(f"{name}: {tool}", None, case=name, variant=tool, **said(output, process.returncode))


def said(output: str, status: int) -> dict:
    """Verdict and note of a tool's run."""
    if "Device not supported" in output:
        return {"verdict": SKIPPED, "note": "compute-sanitizer does not support this device"}
    summary = [line.strip("= \n") for line in output.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    if status == 0:
        return {"verdict": CLEAN, "note": "; ".join(summary)}
    found = [line.strip("= \n") for line in output.splitlines() if line.startswith("=========")]
    return {"verdict": WRONG, "note": "; ".join([*summary, *found[:3]])[:400] or f"exit status {status}"}


EXPERIMENTS = [Experiment(11, "what settings turn on under compute-sanitizer", 100, rows=watch, beside_compiling=True)]
