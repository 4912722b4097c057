"""Hardware counters of attention with and without statistics: experiment 5.

python -m bench.experiments.counters plain|statistics      # what ncu watches: three launches
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dyrate_kernels.measuring import timing

from . import problems
from .runner import FAILED, NOT_REACHED, Context, Experiment, Row

METRICS = (
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sectors_op_write.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "gpu__time_duration.sum",
)
SKIPPED = "skipped"
CASES = (("plain", "mha"), ("statistics", "mha"), ("statistics", "gqa"))
LAUNCHES = 3  # of each; the last one counts, so that nothing is met for the first time


def find_ncu() -> str | None:
    """ncu on PATH or where the toolkit puts it."""
    places = [*Path("/usr/local").glob("cuda*/bin/ncu"), *Path("/opt/nvidia").glob("nsight-compute/*/ncu")]
    return shutil.which("ncu") or next((str(place) for place in sorted(places, reverse=True) if place.is_file()), None)


def parse(text: str) -> list[tuple[str, dict[str, float]]]:
    """(kernel, metric -> value) of each launch, from what ``ncu --csv --print-units base`` prints (lines before its header are others')."""
    lines = text.splitlines()
    begin = next((place for place, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return []
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for line in csv.DictReader(lines[begin:]):
        name, value = line.get("Metric Name"), line.get("Metric Value")
        if name in METRICS and value is not None:
            found.setdefault(line["ID"], (line["Kernel Name"], {}))[1][name] = float(value.replace(",", ""))
    return list(found.values())


def why_not(text: str) -> str:
    """The reason in the output of an ncu that could not read counters."""
    said = [line.strip() for line in text.splitlines() if "==ERROR==" in line or "ERR_" in line]
    return said[0][:200] if said else "ncu printed no counters"


def read(context: Context) -> Iterator[Row]:
    """A row a launch with its counters. The calls are checked in this process first."""
    program, toy = find_ncu(), context.toy
    for form, heads in CASES[:1] if toy else CASES:
        of = problems.shape(toy, heads, 32, 2880)
        about = f"counters of {form}, {of.name} B={of.batch} N={of.visual}"
        if context.left() <= 0:
            yield context.row(about, None, case=about, verdict=NOT_REACHED, note="the time was over")
            continue
        calls, gate, moved = problems.call(context.data(of), form)
        passed = gate(calls[0](), 0)
        facts = {"case": about, "gate": passed, "moved": moved, **of.facts()}
        context.forget()
        if toy or program is None:
            note = "a rehearsal has no counters" if toy else "ncu is not installed"
            yield context.row(about, None, verdict=SKIPPED, note=note, **facts)
            continue
        command = [program, "--clock-control", "none", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS),
                   sys.executable, "-m", "bench.experiments.counters", form, heads]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=max(context.left(), 5.0))
        except subprocess.TimeoutExpired:
            yield context.row(about, None, verdict=NOT_REACHED, note="ncu was stopped: the time was over", **facts)
            continue
        ours = [one for one in parse(done.stdout) if "attention" in one[0] or "decide" in one[0] or "importance" in one[0]]
        if not ours:
            unreadable = "ERR_NVGPUCTRPERM" in done.stdout + done.stderr or "==ERROR==" in done.stdout + done.stderr
            note = why_not(done.stdout + done.stderr)
            yield context.row(about, None, verdict=SKIPPED if unreadable else FAILED, note=note, **facts)
            continue
        yield from _rows(context, ours, facts)


def _rows(context: Context, ours: list[tuple[str, dict[str, float]]], facts: dict[str, Any]) -> Iterator[Row]:
    """Of the last launch of each kernel."""
    for kernel, values in dict(ours).items():
        seconds = values.get("gpu__time_duration.sum", 0.0) * 1e-9
        said = {name: value for name, value in values.items() if not name.startswith("gpu__time")}
        note = ", ".join(f"{name} {value:.5g}" for name, value in said.items())
        times = timing.Times(seconds, seconds, seconds) if seconds else None
        yield context.row(f"{facts['case']}: {kernel}", times, variant=kernel, counters=values, note=note, **facts)


def main() -> None:
    """Runs what ncu watches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=sorted(problems.FORMS))
    parser.add_argument("heads", choices=sorted(problems.HEADS))
    given = parser.parse_args()
    context = Context(toy=not torch.cuda.is_available(), sets=1)
    data = context.data(problems.shape(context.toy, given.heads, 32, 2880))
    with torch.no_grad():
        for _ in range(LAUNCHES):
            problems.call(data, given.form)[0][0]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


EXPERIMENTS = [Experiment(5, "hardware counters of attention with and without statistics", 30, rows=read)]

if __name__ == "__main__":
    main()
