"""The CUDA C++ kernels in their settings, beside the Triton ones: experiment 12."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

import dyrate_kernels as dk
from bench import operators
from dyrate_kernels.ops import cuda

from . import problems
from .propose import CUDA
from .runner import Case, Context, Experiment, Planned, Variant

SETTINGS: dict[str, dict[str, Any]] = {  # fields of ops.cuda.Settings
    "rows through registers": {"stages": 1},
    "2 stages": {"stages": 2},
    "4 stages": {"stages": 4},
    "bulk copies": {"bulk": 1},
    "bulk copies, 4 stages": {"bulk": 1, "stages": 4},
}
ALONE = {"tensor cores": {"tensor_cores": 1}}  # with one query head a key/value head; several take them anyway


@contextlib.contextmanager
def using(chosen: cuda.Settings) -> Iterator[None]:
    """Launches use these settings."""
    before, cuda.override = cuda.override, chosen
    try:
        yield
    finally:
        cuda.override = before


def beside(toy: bool, heads: str, batch: int, visual: int, form: str) -> Planned:
    """A form of attention by the CUDA kernels in each setting, and by the Triton ones."""
    of = problems.shape(toy, heads, batch, visual)
    if toy:
        of = dataclasses.replace(of, dtype=torch.float16)  # 16-bit rows go through the kernel that has settings
    changes = SETTINGS | (ALONE if of.heads == of.kv_heads else {})

    def make(context: Context) -> Case:
        data, states = context.data(of), dk.backends()
        facts: dict[str, Any] = {"sets": data.sets, **of.facts()}
        variants = []
        if states["cuda"] == "available":
            usual = cuda.settings(torch.cuda.get_device_name()) if context.device.type == "cuda" else cuda.Settings()
            data.backend = "cuda"
            calls, gate, _ = problems.call(data, form)
            for name, change in {"as it is": {}, **changes}.items():
                chosen = dataclasses.replace(usual, **change)
                scope = lambda chosen=chosen: using(chosen)  # noqa: E731
                variants.append(Variant(f"{operators.label('cuda')}, {name}", calls, gate, change, scope, data.forget_last_rows))
        else:
            facts["note"] = f"cuda: {states['cuda']}"
        if states["triton"] == "available":
            data.backend = "triton"
            calls, gate, _ = problems.call(data, form)
            variants.append(Variant(operators.label("triton"), calls, gate, prepare=data.forget_last_rows))
        return Case(variants, problems.call(data, form)[2], facts)

    return Planned(f"CUDA C++: {form}, {of.name} B={of.batch} N={of.visual}", make, CUDA, "attention", changes)


def native(toy: bool) -> list[Planned]:
    """Experiment 12."""
    if toy:
        return [beside(True, "mha", 1, 24, "plain")]
    sizes = ((32, 2880), (8, 2880), (1, 576))
    return [beside(False, heads, *size, form) for size in sizes for form in ("plain", "step", "list") for heads in ("mha", "gqa")]


EXPERIMENTS = [Experiment(12, "settings of CUDA C++ attention", 25, native)]
