"""Whole generations, one way against another: experiment 14 (from how many new tokens on a captured step pays) and 15 (the decision of a
captured step beside the score layer's products).

The ways take turns: a round is one generation of each, the first way once more at its end, whose two series are the noise.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

import dyrate_kernels as dk
from bench.end_to_end import forced
from dyrate_kernels.measuring import decoding, random_models, timing
from dyrate_kernels.patching import aside
from dyrate_kernels.patching.fused import fuses
from dyrate_kernels.policies.base import Policy

from . import whole
from .propose import ASIDE, CAPTURE, SWITCHES
from .runner import BASE, NOT_REACHED, Context, Experiment, Row, judge, noise_of

NEW_TOKENS = (2, 3, 4, 6, 8, 12, 16, 24)
TOY_TOKENS = (2, 3)
ROUNDS = (3, 15)  # fewest and most
REPLAYED = 16  # tokens of a generation whose replays are timed; of a rehearsal 3


@dataclass(frozen=True)
class Problem:
    """A model of a shape and what it is asked. layers: of the shape's, fewer where prompts take long; None: all."""

    name: str
    batch: int
    visual: int
    layers: int | None

    def build(self, context: Context) -> tuple[Any, dict[str, Tensor]]:
        """The model, whose shape both share, and its inputs."""
        model = random_models.build("toy" if context.toy else "llava-1.5-7b", context.device, layers=self.layers)
        return model, random_models.inputs(model, self.batch, self.visual, 4 if context.toy else 64)

    def facts(self, model: Any) -> dict[str, Any]:
        """Of its rows."""
        layers = model.config.get_text_config().num_hidden_layers
        return {"B": self.batch, "N": self.visual, "model": self.name, "layers": layers}


PROBLEMS = (Problem("LLaVA-1.5-7B", 1, 576, None), Problem("LLaVA-NeXT-7B", 32, 2880, 4))
TOY = (Problem("toy", 1, 4, None),)


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        name: as the table has it.
        changes: what the device file would hold if it were chosen.
        seconds: of one generation, or of a part of it.
    """

    name: str
    changes: dict[str, Any]
    seconds: Callable[[], float]


def compared(context: Context, ways: Sequence[Way], gate: dict[str, Any], budget: float, **about: Any) -> Iterator[Row]:
    """A row a way, the first being the base. about: of every row, ``case`` among it."""
    if not gate["passed"]:
        for way in ways:
            yield context.row(f"{about['case']}: {way.name}", None, variant=way.name, changes=way.changes, gate=gate, **about)
        return
    fewest, most = (1, 1) if context.toy else ROUNDS
    for way in ways:
        way.seconds()  # the first generation of a kind may still compile
    series: list[list[float]] = [[] for _ in range(len(ways) + 1)]
    begin = time.monotonic()
    while len(series[0]) < fewest or (len(series[0]) < most and time.monotonic() - begin < budget):
        for found, way in zip(series, [*ways, ways[0]], strict=True):
            found.append(way.seconds())
    noise = noise_of(series[0], series[-1])
    for place, (way, seconds) in enumerate(zip(ways, series, strict=False)):
        judged = {"verdict": BASE, "noise": noise, "ratio": 1.0} if place == 0 else judge(series[0], seconds, noise)
        facts = {**about, "variant": way.name, "changes": way.changes, "gate": gate, **judged}
        yield context.row(f"{about['case']}: {way.name}", timing.summary(seconds), **facts)


@contextlib.contextmanager
def patched(model: Any, policy: Policy, retention: str, captured: bool, decides_aside: bool = False) -> Iterator[dk.Handle]:
    """Within: the model is patched; on a CPU, where nothing is captured, with the reference operators."""
    aside.override(decides_aside)
    try:
        on_gpu = next(model.parameters()).is_cuda
        backend, captured = "triton" if on_gpu else "reference", captured and on_gpu
        with dk.patch(model, policy, retention=retention, backend=backend, cuda_graph=captured, fuse=fuses(model, backend)) as handle:
            yield handle
            if captured and (handle.graph is None or handle.graph.off is not None):
                raise RuntimeError(f"no captured step: {handle.graph and handle.graph.off}")
    finally:
        aside.override(None)


Patched = Callable[[], contextlib.AbstractContextManager[dk.Handle]]


def gate_of(
    context: Context, model: Any, fields: dict[str, Tensor], policy: Policy, retention: str, two: Sequence[Patched], known: dict[Any, float]
) -> dict[str, Any]:  # fmt: skip
    """The base against the unpatched model and the reference operators, with one sequence; then the second way's logits against the
    base's, of the same tokens. Both rank by random weights, so the limit of the latter is twice as wide (``decoding.logits_gate``, which
    also says of ``known``).
    """
    if context.toy:
        first = whole.short_gate(model, fields, "triton" if context.device.type == "cuda" else "reference")
    else:
        few = random_models.inputs(model, 1, 576, 64)
        first = decoding.logits_gate(model, few, policy, retention, "triton", fuses(model, "triton"), known)
    answers: list[decoding.Answer] = []
    for way in two:
        with way():
            answers.append(decoding.answer(model, fields, answers[0] if answers else None, 2 if context.toy else None))
        timing.release()
    error, _ = decoding.difference(answers[1], answers[0])
    return timing.correctness(first["limit"], **first["errors"], half_of_the_other_way=error / 2)


# ---- from how many new tokens on ----------------------------------------------------------------------------------------------------


def behind_the_first(model: Any, fields: dict[str, Tensor], new_tokens: int, way: Patched) -> float:
    """Seconds of a whole ``generate()`` behind its first token: the prompt before it is the same in both ways."""
    with way():
        clock = decoding.Clock(model)
        decoding.generate(model, fields, new_tokens, clock)
        timeline = clock.timeline()
    return timeline.whole - timeline.tokens[0]


def captures(context: Context) -> Iterator[Row]:
    """Experiment 14, long answers first: one that the time does not suffice for leaves the entry at the last length that was reached."""
    lengths = sorted(TOY_TOKENS if context.toy else NEW_TOKENS, reverse=True)
    ready = []
    for problem in TOY if context.toy else PROBLEMS:
        model, fields = problem.build(context)
        policy = forced(model)
        eager, captured = (partial(patched, model, policy, "recoverable", on) for on in (False, True))
        gate = gate_of(context, model, fields, policy, "recoverable", (eager, captured), {})
        ready.append((problem, model, fields, eager, captured, gate))
    planned = [(new_tokens, one) for new_tokens in lengths for one in ready]
    for number, (new_tokens, (problem, model, fields, eager, captured, gate)) in enumerate(planned):
        case = f"{new_tokens} new tokens of {problem.name}, B={problem.batch} N={problem.visual}"
        about = {"case": case, "new_tokens": new_tokens, "section": CAPTURE, "key": CAPTURE, **problem.facts(model)}
        if context.left() <= 0:
            yield context.row(case, None, verdict=NOT_REACHED, note="the time was over", **about)
            continue
        ways = [
            Way("eager steps", {}, partial(behind_the_first, model, fields, new_tokens, eager)),
            Way("captured steps", {CAPTURE: new_tokens}, partial(behind_the_first, model, fields, new_tokens, captured)),
        ]
        yield from compared(context, ways, gate, context.left() / (len(planned) - number), **about)


# ---- the decision aside -------------------------------------------------------------------------------------------------------------


def of_a_step(model: Any, fields: dict[str, Tensor], new_tokens: int, way: Patched) -> float:
    """Median seconds of the replays of a ``generate()``, on the device; of a rehearsal of its steps."""
    with way() as handle:
        clock = decoding.Clock(model, handle)
        decoding.generate(model, fields, new_tokens, clock)
        gaps = clock.timeline().gaps()
        return clock.replays().median if clock.marks else statistics.median(gaps)


def shrinking(model: Any, visual: int) -> Policy:
    """A policy under which every one of the first steps drops rows, so that ``evict`` has some to move."""
    steps = range(REPLAYED)
    return dk.policies.Schedule(k=decoding.fitting_k(model), kept=[(step, max(visual // 2 - step * visual // 64, 1)) for step in steps])


def decisions(context: Context) -> Iterator[Row]:
    """Experiment 15: recoverable; evict where steps keep what they have; evict where every step moves rows."""
    new_tokens = 3 if context.toy else REPLAYED
    problems = TOY if context.toy else PROBLEMS
    asked = [("recoverable", "DyRate at 12.5 %"), ("evict", "DyRate at 12.5 %"), ("evict", "fewer in every step")]
    number = len(problems) * len(asked)
    for problem in problems:
        model, fields = problem.build(context)
        known: dict[Any, float] = {}
        for retention, what in asked:
            policy = shrinking(model, problem.visual) if what == asked[-1][1] else forced(model)
            case = f"a step of {problem.name}, B={problem.batch} N={problem.visual}, {retention}, {what}"
            about = {"case": case, "section": SWITCHES, "key": ASIDE, **problem.facts(model)}
            number -= 1
            if context.left() <= 0:
                yield context.row(case, None, verdict=NOT_REACHED, note="the time was over", **about)
                continue
            here, there = (partial(patched, model, policy, retention, True, on) for on in (False, True))
            ways = [
                Way("in its place", {}, partial(of_a_step, model, fields, new_tokens, here)),
                Way("aside", {ASIDE: True}, partial(of_a_step, model, fields, new_tokens, there)),
            ]
            gate = gate_of(context, model, fields, policy, retention, (here, there), known)
            yield from compared(context, ways, gate, context.left() / (number + 1), **about)
        del model, fields
        timing.release()


def compile_steps(context: Context) -> None:
    """The same kernels, from a model of few layers."""
    model = random_models.build("llava-1.5-7b", context.device, layers=4)
    for problem in PROBLEMS:
        fields = random_models.inputs(model, problem.batch, problem.visual)
        for retention in ("recoverable", "evict"):
            for on in (False, True):
                with patched(model, forced(model), retention, True, on):
                    decoding.generate(model, fields, 4)


EXPERIMENTS = [
    Experiment(14, "from how many new tokens on a captured step pays", 35, rows=captures, compile=whole.compile_step),
    Experiment(15, "the decision of a captured step beside the score layer's products", 20, rows=decisions, compile=compile_steps),
]
