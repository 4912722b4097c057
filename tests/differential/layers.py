"""Random calls of what a decoder layer does around its attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dyrate_kernels.ops import layers as reference
from tests.differential.draw import Draw
from tests.differential.operators import DENORMAL, HEADS, ROUNDING, Call, close, finite, nothing_else_changed


def module_of(backend: str) -> Any:
    """The module of the layers' operators for a backend."""
    if backend == "reference":
        return reference
    module = reference.fused(backend, torch.device("cpu"))
    assert module is not None
    return module


def layer_call(draw: Draw, name: str, tolerance: float, *given: Any, least: float = 1e-3, **named: Any) -> Call:
    """``name`` of the layers against itself in float64; the chain of a model rounds at each of its steps.

    tolerance: roundings of the largest result, or of ``least`` where all are smaller: the terms of a sum may be larger than it.
    """

    def wide(part: Any) -> Any:
        if isinstance(part, list):
            return [wide(one) for one in part]
        return part.double().clone(memory_format=torch.contiguous_format) if isinstance(part, Tensor) else part

    dtype = given[0].dtype
    want = flat(getattr(reference, name)(*wide(list(given)), **{key: wide(part) for key, part in named.items()}))

    def check(got: Any) -> None:
        nothing_else_changed(draw)
        for number, (one, expected) in enumerate(zip(flat(got), want, strict=True)):
            assert one.dtype == dtype, f"{name}: {one.dtype}"
            sizes = expected[expected.isfinite()].abs()
            size = max(sizes.max().item() if sizes.numel() else 0.0, least)
            close(one, expected, tolerance * ROUNDING[dtype] * size + DENORMAL[dtype], f"{name} {number}")

    return Call(lambda backend: getattr(module_of(backend), name)(*given, **named), check)


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [results] if isinstance(results, Tensor) else [tensor for part in results for tensor in flat(part)]


def dtype_of(draw: Draw) -> torch.dtype:
    return draw.pick.choice(draw.floats)


def poisoned(draw: Draw, content: Tensor, numbers: tuple[float, ...] = (math.nan, math.inf, -math.inf)) -> Tensor:
    """Now and then with a number that is none."""
    if content.numel() and draw.chance(0.15):
        content.view(-1)[draw.pick.randrange(content.numel())] = draw.pick.choice(numbers)
    return content


def stream(draw: Draw, dtype: torch.dtype, size: int) -> Tensor:
    """Rows of a residual stream."""
    shape = (draw.one(0, 1, 2, 3), draw.one(1, 1, 5), size)
    x = draw.normal(*shape) * draw.one(1.0, 3.0, 1e-3)
    x = draw.place(poisoned(draw, x).to(dtype), expand=(0,))
    draw.tell(f"{list(shape)} {x.stride()} {dtype}")
    return x


def vector(draw: Draw, dtype: torch.dtype, size: int) -> Tensor:
    return draw.place(draw.normal(size).to(dtype))


def rms_norm(draw: Draw) -> Call:
    dtype, size = dtype_of(draw), draw.one(1, 5, 16, 40, 96, 128, 700)
    given = (stream(draw, dtype, size), vector(draw, dtype, size), draw.one(1e-5, 1e-6, 1e-2), draw.chance(0.4))
    return layer_call(draw, "rms_norm", 3, *given)


def residual_norm(draw: Draw) -> Call:
    dtype, size = dtype_of(draw), draw.one(1, 5, 16, 40, 96, 128, 700)
    x = stream(draw, dtype, size)
    residual = draw.place(draw.normal(*x.shape).to(dtype), expand=(0,))
    before = draw.one(None, vector(draw, dtype, size))
    given = (x, residual, vector(draw, dtype, size), draw.one(1e-5, 1e-2), draw.chance(0.4), before)
    return layer_call(draw, "residual_norm", 8, *given)


def gate_mul(draw: Draw) -> Call:
    dtype, activation = dtype_of(draw), draw.pick.choice(reference.ACTIVATIONS)
    shape = draw.one((1, 1, 1), (2, 3, 37), (1, 1, 1111), (4, 1, 64), (0, 1, 8))
    gate, up = (draw.place(poisoned(draw, 4 * draw.normal(*shape), (math.nan,)).to(dtype)) for _ in range(2))
    draw.tell(f"{activation} {list(shape)} {gate.stride()} {up.stride()} {dtype}")
    least = 1e-3
    if activation == "gelu":  # 1 + erf(x) has few digits of a small probability, in a model too
        least = max([least, *(finite(gate) * finite(up)).abs().flatten().tolist()])
    return layer_call(draw, "gate_mul", 4, gate, up, activation, least=least)


def rotate(draw: Draw) -> Call:
    dtype, dim = dtype_of(draw), draw.one(2, 6, 16, 24, 64, 80)
    batch, columns = draw.one(0, 1, 2, 3), draw.one(1, 1, 2, 5)
    heads, kv_heads = draw.pick.choice(HEADS)
    query = draw.place(poisoned(draw, draw.normal(batch, heads, columns, dim)).to(dtype), expand=(0,))
    key = draw.place(draw.normal(batch, kv_heads, columns, dim).to(dtype), expand=(0, 1))
    named: dict[str, Any] = {}
    streams = ()
    if draw.chance(0.3):
        first = draw.pick.randint(0, dim // 2)
        second = draw.pick.randint(0, dim // 2 - first)
        named["sections"] = (first, second, dim // 2 - first - second)
        streams = (3,)
    if draw.chance(0.4):
        named |= {"query_norm": vector(draw, dtype, dim), "key_norm": vector(draw, dtype, dim), "eps": 1e-5, "one_plus": draw.chance(0.5)}
    angle = 6 * draw.uniform(*streams, draw.one(1, batch) if batch else 1, columns, dim)
    cos, sin = draw.place(angle.cos().to(dtype), expand=(0,)), draw.place(angle.sin().to(dtype), expand=(0,))
    draw.tell(f"{list(query.shape)} {query.stride()} {kv_heads} {key.stride()} {list(cos.shape)} {cos.stride()} {dtype} {sorted(named)}")
    return layer_call(draw, "rotate", 8 if "eps" in named else 3, query, key, cos, sin, **named)


def product_rows(draw: Draw, dtype: torch.dtype, size: int) -> Tensor:
    """One row, or a few in any layout."""
    shape = draw.one((1, 1), (1, 1), (2, 1), (1, 5), (3, 1), (17, 1), (64, 1))
    return draw.place(poisoned(draw, draw.normal(*shape, size), (math.nan,)).to(dtype))


def weight(draw: Draw, dtype: torch.dtype, count: int, size: int) -> Tensor:
    return draw.place((draw.normal(count, size) / size**0.5).to(dtype), adjacent=True)


def linears(draw: Draw) -> Call:
    dtype, size = dtype_of(draw), draw.one(1, 5, 40, 96, 300, 513)
    x = product_rows(draw, dtype, size)
    weights, biases = [], []
    all_biased = draw.one(None, True, False)
    for _ in range(draw.one(1, 2, 3)):
        weights.append(weight(draw, dtype, draw.one(1, 3, 16, 17, 50), size))
        biased = draw.chance(0.5) if all_biased is None else all_biased
        biases.append(draw.place(draw.normal(len(weights[-1])).to(dtype), adjacent=True) if biased else None)
    draw.tell(f"{list(x.shape)} -> {[len(one) for one in weights]} {dtype}")
    return layer_call(draw, "linears", 4, x, weights, biases, least=0.5)


def gated(draw: Draw) -> Call:
    dtype, size, count = dtype_of(draw), draw.one(1, 5, 40, 96, 300, 1100), draw.one(1, 3, 4, 17, 50)
    x, activation = product_rows(draw, dtype, size), draw.pick.choice(reference.ACTIVATIONS)
    gate, up = (weight(draw, dtype, count, size) for _ in range(2))
    draw.tell(f"{list(x.shape)} -> {count} {activation} {dtype}")
    return layer_call(draw, "gated", 8, x, gate, up, activation, least=0.5)


def norm_linears(draw: Draw) -> Call:
    dtype, size = dtype_of(draw), draw.one(1, 5, 40, 96, 300, 513)
    x = draw.place(draw.normal(1, 1, size).to(dtype))
    residual = draw.one(None, draw.place(draw.normal(1, 1, size).to(dtype)))
    weights = [weight(draw, dtype, draw.one(1, 16, 50), size) for _ in range(draw.one(1, 2, 3))]
    biases = [draw.one(None, draw.place(draw.normal(len(one)).to(dtype), adjacent=True)) for one in weights]
    draw.tell(f"{size} -> {[len(one) for one in weights]} {dtype}")
    given = (x, residual, vector(draw, dtype, size), 1e-5, weights, biases, draw.chance(0.4))
    return layer_call(draw, "norm_linears", 12, *given, least=0.5)


def norm_gated(draw: Draw) -> Call:
    dtype, size, count = dtype_of(draw), draw.one(1, 5, 40, 96, 300, 513), draw.one(1, 4, 17, 50)
    x = draw.place(draw.normal(1, 1, size).to(dtype))
    residual = draw.one(None, draw.place(draw.normal(1, 1, size).to(dtype)))
    activation = draw.pick.choice(reference.ACTIVATIONS)
    draw.tell(f"{size} -> {count} {activation} {dtype}")
    gate, up = (weight(draw, dtype, count, size) for _ in range(2))
    given = (x, residual, vector(draw, dtype, size), 1e-5, gate, up, activation, draw.chance(0.4))
    return layer_call(draw, "norm_gated", 20, *given, least=0.5)
