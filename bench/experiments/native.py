"""The CUDA C++ kernels beside the Triton ones: experiment 12."""

from __future__ import annotations

from typing import Any

import dyrate_kernels as dk
from bench import operators

from . import problems
from .runner import Case, Context, Experiment, Planned, Variant


def beside(toy: bool, heads: str, batch: int, visual: int, form: str) -> Planned:
    """A form of attention by both backends; the base is the CUDA one, as it is."""
    of = problems.shape(toy, heads, batch, visual)

    def make(context: Context) -> Case:
        data = context.data(of)
        state = dk.backends()["cuda"]
        variants = []
        backends = ("cuda", "triton") if state == "available" or not toy else ("triton",)
        for backend in backends:
            data.backend = backend
            calls, gate, moved = problems.call(data, form)
            variants.append(Variant(operators.label(backend), calls, gate, prepare=data.forget_last_rows))
        facts: dict[str, Any] = {"sets": data.sets, **of.facts()}
        if len(backends) == 1:
            facts["note"] = f"cuda: {state}"
        return Case(variants, moved, facts)

    return Planned(f"CUDA C++: {form}, {of.name} B={of.batch} N={of.visual}", make)


def native(toy: bool) -> list[Planned]:
    """Experiment 12."""
    if toy:
        return [beside(True, "mha", 1, 24, "plain")]
    sizes = ((32, 2880), (8, 2880), (1, 576))
    return [beside(False, heads, *size, form) for size in sizes for form in ("plain", "step") for heads in ("mha", "gqa")]


EXPERIMENTS = [Experiment(12, "CUDA C++ attention", 20, native)]
