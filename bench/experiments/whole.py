"""Where a captured decode step of a whole model spends its time, kernel by kernel: experiment 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

import dyrate_kernels as dk
from bench.end_to_end import forced
from dyrate_kernels.measuring import decoding, random_models, timing
from dyrate_kernels.patching.fused import fuses

from .runner import NOT_REACHED, Context, Experiment, Row

SHOWN = 30  # kernels of a step
PROBLEMS = (("LLaVA-NeXT-7B", 32, 2880), ("LLaVA-1.5-7B", 1, 576))  # name, sequences, visual tokens
BEFORE, STEPS = decoding.WARM + 2, 6  # tokens before the profiler listens, and while it does
LAYERS = (32, 8)  # of the model; fewer where there is little time


class Profiled(LogitsProcessor):
    """Profiles the steps between two tokens of an answer."""

    def __init__(self, before: int, steps: int) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds = [torch.profiler.ProfilerActivity.CUDA]
        self.profiler = torch.profiler.profile(activities=kinds)
        self.before, self.steps, self.seen = before, steps, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += 1
        if self.seen in (self.before, self.before + self.steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.seen == self.before:
            self.profiler.start()
        elif self.seen == self.before + self.steps:
            self.profiler.stop()
        return scores


def kernels(events: Any, steps: int, cuda: bool) -> list[tuple[str, float, float]]:
    """(name, microseconds a step, launches a step) of a profiler's events, the longest first."""
    time = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [(event.key, getattr(event, time) / steps, event.count / steps) for event in events if getattr(event, time) > 0]
    return sorted(found, key=lambda one: -one[1])


def step(context: Context, model: Any, name: str, batch: int, visual: int, gate: dict[str, Any]) -> Iterator[Row]:
    """A row for the step and one for each of its kernels."""
    cuda = context.device.type == "cuda"
    before, steps = (BEFORE, STEPS) if cuda else (2, 1)
    fields = random_models.inputs(model, batch, visual, 64 if cuda else 4)
    profiled = Profiled(before, steps)
    options: dict[str, Any] = {"retention": "recoverable", "backend": "triton", "cuda_graph": cuda, "fuse": fuses(model, "triton")}
    with dk.patch(model, forced(model), **options) as handle:
        decoding.generate(model, fields, before + steps + 1, profiled)
        off = None if handle.graph is None else handle.graph.off
    if off is not None:
        raise RuntimeError(f"no captured step: {off}")
    found = kernels(profiled.profiler.key_averages(), steps, cuda)
    layers = model.config.get_text_config().num_hidden_layers
    facts = {"case": f"a step of {name}, B={batch} N={visual}, {layers} layers", "B": batch, "N": visual, "model": name, "gate": gate}
    total, launches = sum(us for _, us, _ in found), sum(count for _, _, count in found)

    def line(what: str, us: float, note: str) -> Row:
        seconds = us * 1e-6
        return context.row(f"{facts['case']}: {what}", timing.Times(seconds, seconds, seconds), variant=what, note=note, **facts)

    yield line("all kernels", total, f"{launches:.0f} launches a step, {steps} steps")
    for what, us, count in found[:SHOWN]:
        yield line(what[:120], us, f"{count:g} a step, {100 * us / max(total, 1e-9):.1f} %")
    rest = found[SHOWN:]
    if rest:
        yield line(f"{len(rest)} others", sum(us for _, us, _ in rest), f"{sum(count for _, _, count in rest):g} a step")


def profile(context: Context) -> Iterator[Row]:
    """Experiment 1: the gate compares logits with the unpatched model's and with the reference operators', with one sequence."""
    given = context.left()
    toy = context.toy
    layers = None if toy else LAYERS[0] if given > 40 else LAYERS[1]
    model = random_models.build("toy" if toy else "llava-1.5-7b", context.device, layers=layers)
    few = random_models.inputs(model, 1, 4 if toy else 576, 4 if toy else 64)
    gate = (
        short_gate(model, few) if toy else decoding.logits_gate(model, few, forced(model), "recoverable", "triton", fuses(model, "triton"))
    )
    for name, batch, visual in [("toy", 1, 4)] if toy else PROBLEMS:
        if context.left() <= 0:
            yield context.row(f"a step of {name}, B={batch}", None, verdict=NOT_REACHED, note="the time was over")
            continue
        if not gate["passed"]:
            yield context.row(f"a step of {name}, B={batch}", None, gate=gate)
            continue
        yield from step(context, model, name, batch, visual, gate)
        timing.release()


def short_gate(model: Any, fields: dict[str, Tensor], backend: str = "triton") -> dict[str, Any]:
    """Of a rehearsal: two tokens against the unpatched model's."""
    want = decoding.answer(model, fields, new_tokens=2)
    with dk.patch(model, dk.policies.KeepAll(k=decoding.fitting_k(model)), backend=backend, fuse=fuses(model, backend)):
        got = decoding.answer(model, fields, want, 2)
    error, _ = decoding.difference(got, want)
    return timing.correctness(decoding.LIMIT[next(model.parameters()).dtype], of_unpatched=error)


def compile_step(context: Context) -> None:
    """The same kernels, from a model of few layers."""
    model = random_models.build("llava-1.5-7b", context.device, layers=4)
    for _, batch, visual in PROBLEMS:
        fields = random_models.inputs(model, batch, visual)
        with dk.patch(model, forced(model), retention="recoverable", backend="triton", fuse=fuses(model, "triton")):
            decoding.generate(model, fields, 4)


EXPERIMENTS = [Experiment(1, "kernels of a captured step", 60, rows=profile, compile=compile_step)]
