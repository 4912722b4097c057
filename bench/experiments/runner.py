"""Parts shared by all experiments: comparisons behind their gates, the clock, budgets, and what is said where something was not reached.

A :class:`Case` is one problem and several ways to do it, the first of which is the base. All of them are checked against float64, recorded
as CUDA graphs, and replayed in turn; the base is there twice, and how far its two series lie apart is the noise. A ratio is the median
over the rounds of the ratio within a round.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.operators import Data, Gate, Shape, both
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import workspace

from . import clock

Row = dict[str, Any]
CLOCK = 0.6  # seconds that the clock of a case runs at most
NOISE = 0.005  # of a ratio: a smaller difference is none, however quiet the machine
BASE, FASTER, SLOWER, SAME = "base", "faster", "slower", "within noise"
NOT_REACHED, FAILED, WRONG = "not reached", "did not run", "WRONG"


@dataclass
class Variant:
    """One way to do a case's work.

    Attributes:
        name: as the table has it.
        calls: one a set of inputs.
        gate: (what a call left, which set of inputs) -> ``timing.correctness``.
        changes: what the device file would hold if this were chosen; empty where nothing could be chosen.
        scope: in which it is called and recorded, e.g. with its settings in force.
        prepare: before the gate, e.g. to forget what an earlier variant left.
        moved: bytes at least; None: the case's.
        note: what else the table says of it.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    gate: Gate
    changes: dict[str, Any] = field(default_factory=dict)
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    prepare: Callable[[], None] = lambda: None
    moved: int | None = None
    note: str | None = None


@dataclass
class Case:
    """Variants of one problem. moved: bytes at least. facts: of its rows. base: the settings that the base has."""

    variants: list[Variant]
    moved: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A case that is not made yet.

    Attributes:
        name: as the table has it.
        make: of a :class:`Context`.
        section, key: the place in the device file that its variants would change; None: none.
        changes: of each variant but the base, where they are known before the case is made.
    """

    name: str
    make: Callable[[Context], Case]
    section: str | None = None
    key: str | None = None
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """Either cases, most telling first, or rows that are made otherwise.

    Attributes:
        number: as in the table of the README.
        seconds: of 480, its share of the time.
        cases: toy or not -> its cases.
        rows: what yields rows by itself.
        compile: launches what ``rows`` launches once, without a clock.
        beside_compiling: it times nothing, so it runs while the kernels are built.
    """

    number: int
    title: str
    seconds: float
    cases: Callable[[bool], list[Planned]] | None = None
    rows: Callable[[Context], Iterator[Row]] | None = None
    compile: Callable[[Context], None] | None = None
    beside_compiling: bool = False


class Context:
    """Where the experiments run.

    Args:
        sets: of inputs; None: as many as keep the L2 cache cold.
        deadline: of the whole, as ``time.monotonic`` tells it.
        clock: see :func:`bench.experiments.clock.interleaved`.
    """

    def __init__(
        self,
        toy: bool,
        bandwidth: float | None = None,
        deadline: float = float("inf"),
        sets: int | None = None,
        clock: Callable[..., list[list[float]]] = clock.interleaved,
    ) -> None:
        self.toy, self.bandwidth, self.deadline, self.sets, self.clock = toy, bandwidth, deadline, sets, clock
        self.device = timing.here()
        self.until = deadline  # of the experiment that runs
        self.number = 0
        self._data: Data | None = None

    def left(self) -> float:
        """Seconds that the running experiment still has."""
        return min(self.until, self.deadline) - time.monotonic()

    def data(self, shape: Shape, backend: str = "triton") -> Data:
        """Inputs of a shape; those of the last one are kept."""
        if self._data is None or self._data.shape != shape:
            self._data = None
            timing.release()
            self._data = Data(shape, backend, self.device, self.sets)
        self._data.put_last_rows_back()
        self._data.backend = backend
        return self._data

    def forget(self) -> None:
        """Gives the inputs back."""
        self._data = None
        timing.release()

    def row(self, name: str, times: timing.Times | None, **facts: Any) -> Row:
        """``timing.row`` of the running experiment; what is wrong has no speed."""
        gate = facts.get("gate")
        if gate is not None and not gate["passed"]:
            times, facts["verdict"] = None, WRONG
            facts["note"] = f"wrong, so it has no speed: {gate['errors']}"[:300]
        blank = dict.fromkeys(("case", "variant", "ratio", "noise", "verdict", "section", "key")) | {"changes": {}}
        said = {"group": f"experiment {self.number}", "experiment": self.number, "bandwidth": self.bandwidth}
        return timing.row(name, times, **{**blank, **said, **facts})


def run(experiments: Sequence[Experiment], context: Context, save: Callable[[Row], None]) -> list[dict[str, Any]]:
    """Runs them in this order; what time one leaves goes to those after it. Returns what became of each.

    An experiment gets its share of what is left, and is asked for nothing more when that is over; a case that has begun ends.
    """
    found = []
    for place, experiment in enumerate(experiments):
        begin = time.monotonic()
        share = experiment.seconds / sum(later.seconds for later in experiments[place:])
        budget = max(context.deadline - begin, 0.0) * share if context.deadline != float("inf") else float("inf")
        context.number, context.until = experiment.number, begin + budget
        rows: list[Row] = []
        try:
            for row in _rows(experiment, context):
                rows.append(row)
                save(row)
        except Exception as error:  # one that fails does not stop the others
            traceback.print_exc()
            rows.append(context.row(experiment.title, None, verdict=FAILED, note=f"{type(error).__name__}: {error}"[:500], fails=True))
            save(rows[-1])
        context.forget()
        seconds = time.monotonic() - begin
        print(f"experiment {experiment.number}: {seconds:.1f} s of {budget:.0f}", flush=True)
        left_out = sum(row["verdict"] == NOT_REACHED for row in rows)
        found.append({"number": experiment.number, "title": experiment.title, "seconds": round(seconds, 1), "rows": len(rows),
                      "budget": None if budget == float("inf") else round(budget, 1), "not_reached": left_out})  # fmt: skip
    return found


def _rows(experiment: Experiment, context: Context) -> Iterator[Row]:
    if experiment.rows is not None:
        if context.left() <= 0:
            yield context.row(experiment.title, None, verdict=NOT_REACHED, note="the time was over")
            return
        yield from experiment.rows(context)
    planned = [] if experiment.cases is None else experiment.cases(context.toy)
    for number, one in enumerate(planned):
        left = context.left()
        if left <= 0:
            yield context.row(
                one.name, None, case=one.name, verdict=NOT_REACHED, note="the time was over", section=one.section, key=one.key
            )
            continue
        yield from compare(context, one, left / (len(planned) - number))


def compare(context: Context, planned: Planned, budget: float) -> Iterator[Row]:
    """The rows of a case, a variant each. A case that cannot be made is one row that says so.

    Args:
        budget: seconds for all of it, of which the clock gets a half at most.
    """
    about = {"case": planned.name, "section": planned.section, "key": planned.key}
    owner = workspace.Owner()  # scratch memory that goes with the case
    try:
        with workspace.owned(owner):
            case = planned.make(context)
            yield from _compared(context, case, budget, {**about, **case.facts})
    except Exception as error:
        traceback.print_exc()
        yield context.row(planned.name, None, verdict=FAILED, note=f"{type(error).__name__}: {error}"[:300], fails=True, **about)
    finally:
        owner.release()


def _compared(context: Context, case: Case, budget: float, about: dict[str, Any]) -> Iterator[Row]:
    rows: dict[int, Row] = {}
    ready: list[tuple[int, timing.Recorded, dict[str, Any]]] = []

    def said(place: int, times: timing.Times | None, **more: Any) -> Row:
        variant = case.variants[place]
        moved = variant.moved if variant.moved is not None else case.moved
        facts = {**about, "variant": variant.name, "changes": variant.changes, "base": case.base, "moved": moved, **more}
        if variant.note and not facts.get("note"):
            facts["note"] = variant.note
        return context.row(f"{about['case']}: {variant.name}", times, **facts)

    for place, variant in enumerate(case.variants):
        try:
            with variant.scope():
                variant.prepare()
                passed = variant.gate(variant.calls[0](), 0)
                if not passed["passed"]:
                    rows[place] = said(place, None, gate=passed)
                    continue
                ready.append((place, timing.recorded(variant.calls), passed))
        except Exception as error:  # a kernel that cannot be built, or another package's that does not run here
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            rows[place] = said(place, None, verdict=FAILED, note=note, fails=place == 0)
    work = [recorded for _, recorded, _ in ready]
    has_base = bool(ready) and ready[0][0] == 0
    series = context.clock(work + work[:1] if has_base else work, min(budget / 2, CLOCK)) if ready else []
    noise = noise_of(series[0], series[-1]) if has_base else None
    for (place, recorded, before), seconds in zip(ready, series, strict=False):
        with case.variants[place].scope():
            passed = both(before, case.variants[place].gate(recorded.last(), len(case.variants[place].calls) - 1))
        judged: dict[str, Any] = {"verdict": None} | ({} if has_base else {"note": "its base did not run: no ratio"})
        if noise is not None:
            judged = {"verdict": BASE, "noise": noise, "ratio": 1.0} if place == 0 else judge(series[0], seconds, noise)
        rows[place] = said(place, timing.summary(seconds), gate=passed, **judged)
    if 0 in rows and not (rows[0]["correct"] or {"passed": False})["passed"]:
        for place in rows:  # what a wrong or missing base is compared with says nothing
            if place:
                rows[place] |= {"ratio": None, "verdict": rows[place]["verdict"] if rows[place]["median_us"] is None else None}
    for place in sorted(rows):
        yield rows[place]


def noise_of(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns how far two series of the same work lie apart, as a share."""
    ratios = sorted(b / a for a, b in zip(first, second, strict=True))
    spread = (_at(ratios, 0.8) - _at(ratios, 0.2)) / 2 / max(len(ratios), 1) ** 0.5
    return max(abs(statistics.median(ratios) - 1), spread, NOISE)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def judge(base: Sequence[float], seconds: Sequence[float], noise: float) -> dict[str, Any]:
    """``ratio`` to the base and ``verdict``: faster or slower where the median of the rounds' ratios is outside of the noise, and so are
    four of five rounds on its side of 1."""
    ratios = sorted(b / a for a, b in zip(base, seconds, strict=True))
    ratio = statistics.median(ratios)
    verdict = SAME
    if ratio < 1 - noise and _at(ratios, 0.8) < 1:
        verdict = FASTER
    elif ratio > 1 + noise and _at(ratios, 0.2) > 1:
        verdict = SLOWER
    return {"ratio": round(ratio, 4), "noise": round(noise, 4), "verdict": verdict}


def launch_once(context: Context, planned: Planned) -> None:
    """Calls every variant of a case, which builds its kernels, without a clock."""
    case = planned.make(context)
    for variant in case.variants:
        try:
            with variant.scope():
                variant.calls[0]()
        except Exception as error:  # the same is met, and said, where it is measured
            print(f"  {planned.name}, {variant.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    if context.device.type == "cuda":
        torch.cuda.synchronize()
