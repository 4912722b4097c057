"""Matrix products with few rows, ours against cuBLAS: experiment 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import layers as sizes
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layers as own

from .runner import Case, Context, Experiment, Planned, Variant

ROWS = (32, 1, 8, 2, 64, 16, 4)
SHAPES = ("query, key and value", "gate and up", "down", "output")


def parts(text: sizes.Text, which: str) -> tuple[str, int, list[int]]:
    """(function of ``ops.layers``, columns, rows of each weight)."""
    if which == "query, key and value":
        return "linears", text.hidden, [many * text.dim for many in (text.heads, text.kv_heads, text.kv_heads)]
    if which == "gate and up":
        return "gated", text.hidden, [text.intermediate] * 2
    if which == "down":
        return "linears", text.intermediate, [text.hidden]
    return "linears", text.heads * text.dim, [text.hidden]


def product(toy: bool, text: sizes.Text, which: str, rows: int) -> Planned:
    """One product with ``rows`` rows."""
    function, columns, counts = parts(text, which)
    dtype = torch.float32 if toy else torch.bfloat16

    def make(context: Context) -> Case:
        g = torch.Generator(device=context.device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=context.device).to(dtype)

        moved = dtype.itemsize * (columns * sum(counts) + rows * (columns + sum(counts)))
        sets = timing.copies_for_cold_cache(moved) if context.sets is None else context.sets
        weights = [[random(count, columns) / columns**0.5 for count in counts] for _ in range(sets)]
        x = random(rows, 1, columns)
        known: dict[int, list[Tensor]] = {}

        def call(of: Any, given: list[Tensor]) -> list[Tensor]:
            return [of.gated(x, *given)] if function == "gated" else of.linears(x, given, [None] * len(given))

        def right(got: list[Tensor], number: int) -> dict[str, Any]:
            if number not in known:
                wide = [weight.double() for weight in weights[number]]
                known[number] = [own.gated(x.double(), *wide)] if function == "gated" else own.linears(x.double(), wide, [None] * len(wide))
            errors = [timing.relative(one, other) for one, other in zip(got, known[number], strict=True)]
            return timing.correctness(sizes.LIMIT[dtype], output=max(errors))

        def calls(of: Any) -> list[Any]:
            return [lambda given=given: call(of, given) for given in weights]

        variants = [Variant("torch (cuBLAS)", calls(own), right)]
        kernels = own.fused("triton", context.device)
        if rows == 1:
            variants.append(Variant("dyrate", calls(kernels), right))
        facts = {"sets": sets, "B": rows, "model": text.name, "dtype": str(dtype).removeprefix("torch.")}
        return Case(variants, moved, facts)

    return Planned(f"{which} of {text.name}, {rows} rows", make)


def few_rows(toy: bool) -> list[Planned]:
    """Experiment 3."""
    text = sizes.TOY[0] if toy else sizes.MODELS[0]
    return [product(toy, text, which, rows) for rows in ((1,) if toy else ROWS) for which in (SHAPES[:2] if toy else SHAPES)]


EXPERIMENTS = [Experiment(3, "matrix products with 1 to 64 rows against cuBLAS", 75, few_rows)]
