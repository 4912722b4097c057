"""Attention with a new row: experiments 2 (registers, and buffers that are longer than what is live in them), 6 and 9 (forms of the main
loop) and 7 (waves, splits, combination)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import expected, operators
from bench.operators import Gate
from dyrate_kernels import ops
from dyrate_kernels.measuring import timing

from .problems import Changes, case, shape
from .runner import Case, Context, Experiment, Planned, Variant

LIVE, TEXT = 360, 128  # visual rows that live in the buffers of experiment 2: 12.5 % of 2880
CAPACITIES = (384, 448, 2880)


def grid(toy: bool, forms: tuple[str, ...], heads: tuple[str, ...], sizes: tuple[tuple[int, int], ...], changes: Changes) -> list[Planned]:
    """The cases of ``forms`` at ``heads`` and (batch, visual tokens); in a rehearsal the first of each form and heads, one change."""
    if toy:
        few = dict(list(changes.items())[:1])
        return [case(shape(True, name, 1, 24), form, few) for form in forms[:1] for name in heads[:1]]
    return [case(shape(False, name, *size), form, changes) for size in sizes for name in heads for form in forms]


def registers(toy: bool) -> list[Planned]:
    """Experiment 2."""
    sizes = ((32, 2880), (1, 576), (8, 2880), (32, 576), (8, 576), (1, 2880))
    forms = ("list", "step", "plain")
    found = grid(toy, forms, ("mha", "gqa"), sizes, {"at most 128 registers": {"max_registers": 128}})
    if toy:
        return [*found, riddle(True, "mha", 2)]
    return [*found[:6], riddle(False, "mha", 32), *found[6:], riddle(False, "gqa", 32), riddle(False, "mha", 8)]


def riddle(toy: bool, heads: str, batch: int) -> Planned:
    """As many live rows in buffers of several capacities, and through a list: what does a short buffer cost under ``evict``?"""
    live, text, capacities = (5, 3, (6, 8, 24)) if toy else (LIVE, TEXT, CAPACITIES)
    of = shape(toy, heads, batch, live)
    of = dataclasses.replace(of, visual=live, text=text)

    def make(context: Context) -> Case:
        device, whole = context.device, capacities[-1]
        one = 2 * batch * of.kv_heads * (whole + text) * of.dim * of.dtype.itemsize
        sets = timing.copies_for_cold_cache(of.kv_bytes) if context.sets is None else context.sets
        sets = max(min(sets, (16 << 30) // one), 1)
        g = torch.Generator(device=device).manual_seed(3)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=g, device=device, dtype=of.dtype)

        query = [random(of.batch, of.heads, of.dim) for _ in range(sets)]
        rows = [[random(of.batch, of.kv_heads, live + text, of.dim) for _ in range(2)] for _ in range(sets)]
        picked = torch.rand(of.batch, whole, generator=g, device=device).topk(live, dim=1).indices.sort(dim=1).values
        lengths = [torch.full((of.batch,), number, dtype=torch.int32, device=device) for number in (live, text)]
        types = torch.zeros(of.batch, text, dtype=torch.uint8, device=device)
        known: dict[int, torch.Tensor] = {}

        def gate(got: Any, number: int) -> dict[str, Any]:
            few = sorted({0, of.batch - 1})
            if number not in known:
                key, value = (tensor[few] for tensor in rows[number])
                known[number] = expected.attention(query[number][few], key, value, live, types[few]).output
            return timing.correctness(operators.LIMIT[of.dtype], output=timing.relative(got.output[few], known[number]))

        def within(capacity: int, listed: bool = False) -> list[Callable[[], Any]]:
            """The last text row comes with the call."""
            calls: list[Callable[[], Any]] = []
            for number in range(sets):
                buffers = [torch.full((of.batch, of.kv_heads, capacity + text, of.dim), torch.nan, dtype=of.dtype, device=device)
                           for _ in range(2)]  # fmt: skip
                for buffer, tensor in zip(buffers, rows[number], strict=True):
                    if listed:
                        place = picked[:, None, :, None].expand(-1, of.kv_heads, -1, of.dim)
                        buffer.scatter_(2, place, tensor[:, :, :live])
                    else:
                        buffer[:, :, :live] = tensor[:, :, :live]
                    buffer[:, :, capacity : capacity + text - 1] = tensor[:, :, live:-1]
                new: dict[str, Any] = {"new_key": rows[number][0][:, :, -1].clone(), "new_value": rows[number][1][:, :, -1].clone()}
                n_visual = torch.full_like(lengths[0], capacity) if listed else lengths[0]
                more: dict[str, Any] = {"kept": picked.int(), "n_kept": lengths[0]} if listed else {}
                more |= {"n_visual": n_visual, "n_text": lengths[1], "visual_capacity": capacity, "backend": "triton"}
                calls.append(partial(ops.decode_attention, query[number], buffers[0], buffers[1], **new, **more))
            return calls

        same: Gate = gate
        variants = [Variant(f"capacity {capacity}", within(capacity), same) for capacity in capacities]
        variants.append(Variant(f"{live} of {whole} through the list", within(whole, listed=True), same))
        return Case(variants, of.attention_bytes + of.new_row_bytes, {"sets": sets, **of.facts()})

    return Planned(f"{live} live rows, {heads} B={of.batch}", make)


def grids(toy: bool) -> list[Planned]:
    """Experiment 7: each change where it makes another launch."""
    waves = {f"{number} waves": {"waves": number} for number in (2, 1, 8)}
    splits = {f"{number} splits at most": {"most_splits": number} for number in (32, 16, 8)}
    combined = {f"combines {number} at once": {"combined": number} for number in (1024, 4096, 8192)}
    both = {"32 splits at most, combines 4096 at once": {"most_splits": 32, "combined": 4096}}
    apart = {"combined in a launch of its own": {"combine": "second_launch"}}
    if toy:
        return grid(True, ("plain",), ("mha",), (), waves)
    found = grid(False, ("list", "plain", "step"), ("mha",), ((32, 2880),), waves)
    found += grid(False, ("plain", "step", "list"), ("gqa",), ((1, 2880),), {**apart, **splits, **combined, **both})
    found += grid(False, ("plain", "step", "list"), ("mha",), ((1, 2880), (1, 576), (8, 2880)), apart)
    found += grid(False, ("plain", "step", "list"), ("gqa",), ((8, 2880), (32, 2880)), {**apart, **combined})
    return found


LOOPS: Changes = {  # of the main loop
    "16 rows a step": {"block_n": 16},
    "64 rows a step": {"block_n": 64},
    "64 rows a step, 8 warps": {"block_n": 64, "num_warps": 8},
    "as many programs as fit": {"programs_per_sm": None},
    "2 stages": {"num_stages": 2},
    "4 stages": {"num_stages": 4},
}


TENSOR_CORES: Changes = {
    "tensor cores": {"tensor_cores": True},
    "tensor cores, 64 rows a step": {"tensor_cores": True, "block_n": 64},
    "tensor cores, rows of each warp": {"tensor_cores": True, "warp_rows": True},
}
WARP_ROWS: Changes = {
    "rows of each warp": {"warp_rows": True},
    "rows of each warp, 3 programs": {"warp_rows": True, "programs_per_sm": 3},
    "rows of each of 2 warps": {"warp_rows": True, "num_warps": 2, "programs_per_sm": 6},
    "rows of each warp, 2 stages": {"warp_rows": True, "num_stages": 2},
}


def loops(toy: bool) -> list[Planned]:
    """Experiment 6: one query head a key/value head."""
    return grid(toy, ("list", "step", "plain"), ("mha",), ((32, 2880), (1, 576), (8, 2880)), TENSOR_CORES | LOOPS)


def grouped(toy: bool) -> list[Planned]:
    """Experiment 9: several."""
    return grid(toy, ("list", "step", "plain"), ("gqa",), ((32, 2880), (1, 2880), (8, 2880)), WARP_ROWS | LOOPS)


EXPERIMENTS = [
    Experiment(2, "attention with a new row: registers; buffers longer than what lives in them", 45, registers),
    Experiment(7, "waves, splits, combination", 30, grids),
    Experiment(6, "forms of the main loop, one query head a key/value head", 35, loops),
    Experiment(9, "forms of the main loop, grouped queries", 35, grouped),
]
