"""A run of the experiments: what is launched is built first, by several processes; then they run, and now and then all is written."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from dyrate_kernels.files import write_json
from dyrate_kernels.measuring import timing

from . import propose, registry, runner, table

COMPILING = 120.0  # seconds of 470 at most
BETWEEN = 10.0  # seconds from one writing of the files to the next, so that one that is stopped leaves something


def picked(numbers: list[int] | None) -> list[runner.Experiment]:
    """The experiments of these numbers, or all."""
    return [one for one in registry.EXPERIMENTS if numbers is None or one.number in numbers]


def measure(out: Path, numbers: list[int] | None, toy: bool, seconds: float) -> int:
    """Runs the experiments of these numbers, or all. Exit status 1 where a result was wrong or an experiment failed; what was not reached
    is said, and is no failure."""
    begin = time.monotonic()
    deadline = begin + seconds
    chosen = picked(numbers)
    if not timing.environment()["measurement"]:
        print(timing.REHEARSAL)
    rows: list[runner.Row] = []
    done: list[dict] = []

    written = [begin]

    def save(row: runner.Row) -> None:
        rows.append(row)
        if time.monotonic() - written[0] > BETWEEN:  # not after each row: a long table takes a while
            write(out, rows, done)
            written[0] = time.monotonic()
        state = row["verdict"] or ""
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.3f} of the base"
        what = "" if row["median_us"] is None else f" {row['median_us']} us{ratio}"
        print(f"[{row['experiment']}] {row['name']}:{what} {state} {row.get('note') or ''}".rstrip(), flush=True)

    with torch.no_grad():
        context = runner.Context(toy, deadline=deadline)
        alone = [one for one in chosen if one.beside_compiling]
        timed = [one for one in chosen if not one.beside_compiling]
        compiling = None if toy else start_compiling(chosen)
        context.deadline = deadline if toy else min(begin + COMPILING * seconds / 470, deadline)
        try:
            done += runner.run(alone, context, save)
            if compiling is not None:
                wait(compiling, context.deadline)
        finally:
            if compiling is not None and compiling.poll() is None:
                compiling.terminate()  # its workers with it, see compile_all
                compiling.wait()
        if toy:
            compile_all(timed[:1], toy, most=1)
        context.deadline = deadline
        context.bandwidth = timing.copy_bandwidth()[0]
        print(f"copy: {context.bandwidth / 1e9:.1f} GB/s; {deadline - time.monotonic():.0f} s left", flush=True)
        done += runner.run([*timed, registry.confirming(rows)], context, save)
    path = write(out, rows, done)
    print(f"{time.monotonic() - begin:.0f} s; table: {out / 'experiments.md'}; proposed: {path or 'nothing'}")
    bad = [row for row in rows if row["verdict"] in (runner.WRONG, runner.FAILED)]
    for row in bad:
        print(f"not good: {row['name']}: {row.get('note')}")
    return 1 if any(row["verdict"] == runner.WRONG or row.get("fails") for row in bad) else 0


def write(out: Path, rows: list[runner.Row], done: list[dict]) -> Path | None:
    """``experiments.md``, ``experiments.json`` and, where something is proposed, the device file, whose path is returned."""
    here = timing.environment()
    from dyrate_kernels.triton_kernels import plan

    name = here["gpu"] if torch.cuda.is_available() else plan.INTERPRETED
    path, body = propose.write(out, rows, name)
    report = {"environment": here, "experiments": done, "rows": rows, "proposed": body if path else None}
    write_json(out / "experiments.json", report)
    found = list(propose.candidates(rows))
    (out / "experiments.md").write_text(table.markdown(rows, done, found, path.name if path else None), encoding="utf-8")
    return path


def start_compiling(experiments: list[runner.Experiment]) -> subprocess.Popen:
    """``--compile`` in a process of its own."""
    numbers = [str(one.number) for one in experiments]
    command = [sys.executable, "-m", "bench.experiments", "--compile", "--only", *numbers]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


def wait(process: subprocess.Popen, deadline: float) -> None:
    """Until it is done, or the time for it is over: what was not built then is built where it is needed, before its clock starts."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        print("not all kernels are built: the time for it was over", flush=True)


def compile_all(experiments: list[runner.Experiment], toy: bool, most: int | None = None) -> None:
    """Launches everything once, without a clock, in as many processes as there are cores; in a rehearsal in this one."""
    work: list[tuple[int, int | None]] = []
    for one in experiments:
        work += [(one.number, None)] if one.compile is not None and not toy else []
        work += [(one.number, place) for place in range(len(one.cases(toy) if one.cases else ()))]
    work = work[:most]
    begin = time.monotonic()
    if toy:
        for number, place in work:
            _compile((number, place, toy))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves the pool, which ends its workers
        with multiprocessing.get_context("spawn").Pool(min(len(work), os.cpu_count() or 1)) as pool:
            for line in pool.imap_unordered(_compile, [(number, place, toy) for number, place in work]):
                print(line, flush=True)
    print(f"built what {len(work)} cases launch: {time.monotonic() - begin:.1f} s", flush=True)


def _compile(work: tuple[int, int | None, bool]) -> str:
    number, place, toy = work
    begin = time.monotonic()
    experiment = next(one for one in registry.EXPERIMENTS if one.number == number)
    context = runner.Context(toy, sets=1)
    name = experiment.title
    try:
        with torch.no_grad():
            if place is None:
                assert experiment.compile is not None  # ``compile_all`` asks for what there is
                experiment.compile(context)
            else:
                assert experiment.cases is not None
                planned = experiment.cases(toy)[place]
                name = planned.name
                runner.launch_once(context, planned)
    except Exception as error:  # met again where it is measured
        return f"  {number}, {name}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        context.forget()
    return f"  {number}, {name}: {time.monotonic() - begin:.1f} s"
