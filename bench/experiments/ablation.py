"""The cost of statistics and of the decision, piece by piece: experiments 4 and 10."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench import expected, operators
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing

from .problems import Changes, case, shape
from .runner import Case, Context, Experiment, Planned, Variant

STATISTICS: Changes = {
    "importance in the attention's launch": {"decision": "same_launch"},
    "the sum over heads alone": {"decision": "two_launches"},
    "logits in float16": {"logit_bytes": 2},
}
DECISION: Changes = {
    "the decision in the attention's launch": {"decision": "same_launch"},
    "the sum over heads and the decision apart": {"decision": "two_launches"},
}


def pieces(toy: bool, heads: str, batch: int) -> Planned:
    """Attention alone, and with one thing after the other on top."""
    of = shape(toy, heads, batch, 2880)

    def make(context: Context) -> Case:
        data = context.data(of)
        right = operators.attention_gate(data)
        types = {"text_type": data.text_type}
        extra = 4 * of.batch * of.visual
        asked: dict[str, tuple[dict[str, Any], int]] = {
            "attention alone": ({}, 0),
            "with mass": ({**types, "mass": True}, of.batch * (of.text + 16 * of.heads)),
            "with importance": ({"importance": True}, extra),
            "with both": ({**types, "mass": True, "importance": True}, of.statistics_bytes),
        }
        base = of.attention_bytes + of.new_row_bytes
        variants = [
            Variant(
                name, data.ours(ops.decode_attention, new_row=True, **more), right, prepare=data.forget_last_rows, moved=base + moved
            )
            for name, (more, moved) in asked.items()
        ]  # fmt: skip

        def decided(got: Any, number: int) -> dict[str, Any]:
            return operators.step_gate(of, right(got, number), got, data.linear)

        steps = data.ours(ops.decode_step, new_row=True, **types, **data.linear)
        moved = base + of.statistics_bytes + extra
        variants.append(Variant("with both and the decision", steps, decided, prepare=data.forget_last_rows, moved=moved))
        return Case(variants, None, {"sets": data.sets, **of.facts()})

    return Planned(f"what statistics cost, {of.name} B={of.batch} N={of.visual}", make)


def statistics(toy: bool) -> list[Planned]:
    """Experiment 4."""
    if toy:
        return [pieces(True, "mha", 1), case(shape(True, "mha", 1, 24), "statistics", STATISTICS)]
    sizes = (("mha", 32), ("mha", 8), ("gqa", 32), ("gqa", 8))
    found = [pieces(False, *size) for size in sizes]
    return [*found, *(case(shape(False, heads, batch, 2880), "statistics", STATISTICS) for heads, batch in sizes)]


@contextlib.contextmanager
def constants(**values: Any) -> Iterator[None]:
    """``plan`` with other constants: for what is no setting. Prepared launches are forgotten before and after."""
    from dyrate_kernels.triton_kernels import backend, plan

    before = {name: getattr(plan, name) for name in values}
    backend._attentions.clear()
    for name, value in values.items():
        setattr(plan, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(plan, name, value)
        backend._attentions.clear()


def tile(columns: int) -> Callable[[int], tuple[int, int]]:
    """``plan.importance`` with so many columns a tile."""
    from dyrate_kernels.triton_kernels import plan

    usual = plan.importance
    return lambda heads: (usual(heads)[0], columns)


def shapes_of_decision(toy: bool, heads: str, batch: int) -> Planned:
    """The launch that decides: its tile and its warps, which are constants of ``plan``."""
    of = shape(toy, heads, batch, 2880)

    def make(context: Context) -> Case:
        data = context.data(of)
        right = operators.attention_gate(data)
        calls = data.ours(ops.decode_step, new_row=True, text_type=data.text_type, **data.linear)

        def decided(got: Any, number: int) -> dict[str, Any]:
            return operators.step_gate(of, right(got, number), got, data.linear)

        others: dict[str, dict[str, Any]] = {"as it is": {}}
        for columns, warps in ((64, 8),) if toy else ((64, 8), (128, 4), (128, 8), (256, 4), (256, 8)):
            others[f"tiles of {columns} columns, {warps} warps"] = {"importance": tile(columns), "DECIDE_WARPS": warps}
        variants = [
            Variant(name, calls, decided, prepare=data.forget_last_rows, scope=partial(constants, **values))
            for name, values in others.items()
        ]
        moved = of.attention_bytes + of.new_row_bytes + of.statistics_bytes + 4 * of.batch * of.visual
        return Case(variants, moved, {"sets": data.sets, **of.facts()})

    return Planned(f"tile and warps of the decision, {of.name} B={of.batch} N={of.visual}", make)


def selection(toy: bool, batch: int, tokens: int) -> Planned:
    """``select_tokens`` alone, beside torch's, with other numbers of warps."""
    batch, tokens = (2, 24) if toy else (batch, tokens)

    def make(context: Context) -> Case:
        device = context.device
        g = torch.Generator(device=device).manual_seed(4)
        score = torch.rand(batch, tokens, generator=g, device=device)
        keep = tokens // 8
        count, total = (torch.full((batch,), number, dtype=torch.int32, device=device) for number in (keep, tokens))
        best = expected.highest(score, keep)

        def chosen(got: Any, number: int) -> dict[str, Any]:
            return timing.correctness(0.0, kept_wrong=operators.selection_wrong(score, keep, *got))

        def picked(got: Any, number: int) -> dict[str, Any]:
            return timing.correctness(0.0, kept_wrong=float((got != best).sum()))

        calls = [lambda: ops.select_tokens(score, count, total, backend="triton")]
        variants = [Variant("as it is", calls, chosen)]
        for warps in (4,) if toy else (4, 16):
            variants.append(Variant(f"{warps} warps", calls, chosen, scope=partial(constants, SELECT_WARPS=warps)))
        variants.append(Variant("torch topk and sort", [lambda: score.topk(keep, dim=1).indices.sort(dim=1).values], picked))
        return Case(variants, 8 * batch * tokens, {"B": batch, "N": tokens})

    return Planned(f"select_tokens alone, B={batch} N={tokens}", make)


def decision(toy: bool) -> list[Planned]:
    """Experiment 10."""
    if toy:
        return [shapes_of_decision(True, "mha", 1), selection(True, 1, 24)]
    found = [shapes_of_decision(False, "mha", 32), selection(False, 32, 2880)]
    found += [case(shape(False, heads, batch, 2880), "step", DECISION) for heads in ("mha", "gqa") for batch in (32, 8, 1)]
    return [*found, shapes_of_decision(False, "gqa", 32), selection(False, 1, 576), selection(False, 8, 16384)]


EXPERIMENTS = [
    Experiment(4, "what mass, importance and the decision cost", 35, statistics),
    Experiment(10, "selection and decision: tiles, warps, launches", 20, decision),
]
