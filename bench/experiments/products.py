"""Matrix products with few rows, ours against cuBLAS: experiment 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import layers as sizes
from dyrate_kernels.measuring import timing
from dyrate_kernels.ops import layer_settings
from dyrate_kernels.ops import layers as own

from .propose import PRODUCTS
from .runner import Case, Context, Experiment, Planned, Variant

ROWS = (32, 1, 8, 2, 64, 16, 4)
SHAPES = ("query, key and value", "gate and up", "down", "output")
Tiles = dict[str, dict[str, int]]
TILES: Tiles = {  # fields of layer_settings.Tile; the first is the kernels' own choice
    "as the kernel chooses": {},
    "2 splits": {"splits": 2},
    "4 splits": {"splits": 4},
    "8 splits": {"splits": 8},
    "64 columns, 6 stages": {"columns": 64, "stages": 6},
    "64 columns, 6 stages, 4 splits": {"columns": 64, "stages": 6, "splits": 4},
    "128 rows, 64 columns": {"rows": 128, "columns": 64, "stages": 4},
    "128 rows, 64 columns, 4 splits": {"rows": 128, "columns": 64, "stages": 4, "splits": 4},
    "32 rows": {"rows": 32},
}
TOY_TILES: Tiles = {"as the kernel chooses": {}, "2 splits": {"rows": 16, "columns": 16, "splits": 2}}


@contextlib.contextmanager
def using(settings: layer_settings.LayerSettings) -> Iterator[None]:
    """Products are shaped by these settings."""
    layer_settings.override(settings)
    try:
        yield
    finally:
        layer_settings.override(None)


def parts(text: sizes.Text, which: str) -> tuple[str, int, list[int]]:
    """(kind of ``layer_settings.KINDS``, columns, rows of each weight)."""
    if which == "query, key and value":
        return "linear", text.hidden, [many * text.dim for many in (text.heads, text.kv_heads, text.kv_heads)]
    if which == "gate and up":
        return "gated", text.hidden, [text.intermediate] * 2
    if which == "down":
        return "linear", text.intermediate, [text.hidden]
    return "linear", text.heads * text.dim, [text.hidden]


def product(toy: bool, text: sizes.Text, which: str, rows: int) -> Planned:
    """One product with ``rows`` rows. With one row ours is always taken, so nothing could be chosen."""
    kind, columns, counts = parts(text, which)
    dtype = torch.float32 if toy else torch.bfloat16
    problem = layer_settings.problem(kind, counts[0] if kind == "gated" else sum(counts), columns)
    tiles = {} if rows == 1 else TOY_TILES if toy else TILES

    def make(context: Context) -> Case:
        g = torch.Generator(device=context.device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=context.device).to(dtype)

        moved = dtype.itemsize * (columns * sum(counts) + rows * (columns + sum(counts)))
        sets = timing.copies_for_cold_cache(moved) if context.sets is None else context.sets
        weights = [[random(count, columns) / columns**0.5 for count in counts] for _ in range(sets)]
        x = random(rows, 1, columns)
        known: dict[int, list[Tensor]] = {}

        def call(of: Any, x: Tensor, given: list[Tensor]) -> list[Tensor]:
            return [of.gated(x, *given)] if kind == "gated" else of.linears(x, given, [None] * len(given))

        def right(got: list[Tensor], number: int) -> dict[str, Any]:
            if number not in known:
                known[number] = call(own, x.double(), [weight.double() for weight in weights[number]])
            errors = [timing.relative(one, other) for one, other in zip(got, known[number], strict=True)]
            return timing.correctness(sizes.LIMIT[dtype], output=max(errors))

        def calls(of: Any) -> list[Any]:
            return [partial(call, of, x, given) for given in weights]

        ours = calls(own.fused("triton", context.device))
        variants = [Variant("torch (cuBLAS)", calls(own), right)]
        if rows == 1:
            variants.append(Variant("dyrate", ours, right))
        for name, tile in tiles.items():
            chosen = {problem: ((1, own.MOST_ROWS, layer_settings.Tile(**tile)),)}
            settings = layer_settings.LayerSettings(products=chosen)
            variants.append(Variant(name, ours, right, {"tile": tile}, partial(using, settings)))
        return Case(variants, moved, {"sets": sets, "B": rows, "model": text.name, "dtype": str(dtype).removeprefix("torch.")})

    changes = {name: {"tile": tile} for name, tile in tiles.items()}
    section, key = (PRODUCTS, f"{problem}, {rows} rows") if tiles else (None, None)
    return Planned(f"{which} of {text.name}, {rows} rows", make, section, key, changes)


def few_rows(toy: bool) -> list[Planned]:
    """Experiment 3."""
    text = sizes.TOY[0] if toy else sizes.MODELS[0]
    if toy:
        return [product(True, text, "query, key and value", 1), product(True, text, "gate and up", 4)]
    found = [product(False, text, which, rows) for rows in ROWS for which in SHAPES]
    return found + [product(False, sizes.MODELS[1], which, 32) for which in SHAPES]


EXPERIMENTS = [Experiment(3, "matrix products with 1 to 64 rows against cuBLAS", 60, few_rows)]
