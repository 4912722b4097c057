"""Cases of the Triton kernels' settings: a call as a model makes it, with its newest row, under one setting after the other."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import operators
from bench.operators import Data, Gate, Shape
from dyrate_kernels import ops

from .runner import Case, Context, Planned, Variant

Changes = dict[str, dict[str, Any]]  # name of a variant -> fields of plan.Settings
HEADS = {"mha": (32, 32, 128), "gqa": (28, 4, 128)}
TOY_HEADS = {"mha": (2, 2, 16), "gqa": (4, 2, 16)}
SHOWN = {"logit_bytes"}  # settings that change which tokens stay: timed, and for whoever asks for them
NOT_PROPOSED = "it may change the order of tokens of nearly the same importance, so it is not proposed"
FORMS = {"plain": "plain", "list": "list", "statistics": "score", "step": "score"}  # of a call -> kind of problem


def shape(toy: bool, heads: str, batch: int, visual: int) -> Shape:
    """Of ``HEADS``, with 128 text rows; in a rehearsal as small as it can be."""
    if toy:
        return Shape(heads, min(batch, 2), 24, 8, *TOY_HEADS[heads], torch.float32)
    return Shape(heads, batch, visual, 128, *HEADS[heads], torch.bfloat16)


@contextlib.contextmanager
def using(chosen: Any) -> Iterator[None]:
    """Launches use these ``plan.Settings``."""
    from dyrate_kernels.triton_kernels import plan

    before = plan.overridden()
    plan.override(chosen)
    try:
        yield
    finally:
        plan.override(before)


def key_of(of: Shape, kind: str) -> str:
    """The device file's key of a shape's problem."""
    from dyrate_kernels.triton_kernels import plan

    return plan.problem(of.heads // of.kv_heads, of.dim, of.dtype.itemsize, kind)


def settings_of(of: Shape, kind: str, device: torch.device) -> Any:
    """``plan.Settings`` as the launcher would take them now."""
    from dyrate_kernels.triton_kernels import plan

    name = plan.INTERPRETED if device.type == "cpu" else torch.cuda.get_device_name(device)
    return plan.settings(name, of.heads // of.kv_heads, of.dim, of.dtype.itemsize, kind)


def call(data: Data, form: str) -> tuple[list[Callable[[], Any]], Gate, int]:
    """(calls with a new row, gate, bytes that they move) of a form of ``FORMS``."""
    of = data.shape
    base = of.attention_bytes + of.new_row_bytes
    if form == "list":
        few = dataclasses.replace(of, visual=of.kept)
        calls = data.ours(ops.decode_attention, new_row=True, kept=data.kept, n_kept=data.n_kept)
        return calls, operators.attention_gate(data, data.kept), few.attention_bytes + of.new_row_bytes
    right = operators.attention_gate(data)
    if form == "plain":
        return data.ours(ops.decode_attention, new_row=True), right, base
    types = {"text_type": data.text_type}
    if form == "statistics":
        calls = data.ours(ops.decode_attention, new_row=True, **types, mass=True, importance=True)
        return calls, right, base + of.statistics_bytes

    def decided(got: Any, number: int) -> dict[str, Any]:
        return operators.step_gate(of, right(got, number), got, data.linear)

    calls = data.ours(ops.decode_step, new_row=True, **types, **data.linear)
    return calls, decided, base + of.statistics_bytes + 4 * of.batch * of.visual


def logits_in_float16(gate: Gate) -> Gate:
    """``gate``, but with mass and importance as right as float16 makes them."""

    def right(got: Any, number: int) -> dict[str, Any]:
        found = gate(got, number)
        wide = max(found["limit"], operators.LIMIT[torch.float16])
        within = (error <= (wide if name in ("mass", "importance") else found["limit"]) for name, error in found["errors"].items())
        return {**found, "passed": all(within)}

    return right


def case(of: Shape, form: str, changes: Changes) -> Planned:
    """``form`` at a shape, under the present settings and under each of ``changes``."""
    kind = FORMS[form]

    def make(context: Context) -> Case:
        data = context.data(of)
        calls, gate, moved = call(data, form)
        usual = settings_of(of, kind, context.device)
        variants = []
        for name, change in {"as it is": {}, **changes}.items():
            chosen = dataclasses.replace(usual, **change)
            scope = lambda chosen=chosen: using(chosen)  # noqa: E731
            variant = Variant(name, calls, gate, change, scope, data.forget_last_rows)
            if SHOWN & change.keys():
                variant = dataclasses.replace(variant, gate=logits_in_float16(gate), changes={}, note=NOT_PROPOSED)
            variants.append(variant)
        facts = {"sets": data.sets, **of.facts()}
        return Case(variants, moved, facts, dataclasses.asdict(usual))

    return Planned(f"{form}, {of.name} B={of.batch} N={of.visual}", make, "settings", key_of(of, kind), changes)


def again(toy: bool, key: str, changes: Changes) -> list[Planned]:
    """The cases of a key of the device file: every form and heads that have it, at batches 32, 8 and 1."""
    found = []
    for heads in HEADS:
        for form, kind in FORMS.items():
            for batch in (1,) if toy else (32, 8, 1):
                of = shape(toy, heads, batch, 2880)
                if form != "statistics" and key_of(of, kind) == key:
                    found.append(case(of, form, changes))
    return found
