"""Matrix products with one row, of several weights in a launch, and of gate and up with their gate.

A product with one row is nothing but reading the weights: each program reads whole rows. NORM: the row is what RMSNorm makes of x (1:
Llama's, 2: Gemma's) or, with a residual, of ``residual + x``; every program computes it again, which is less than a launch and a round trip
through memory, and the first one writes the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyrate_kernels.ops.layers import activation_number

from .dependent import fetch_ahead, follow
from .gates import apply_gate
from .launch import start
from .norms import scale_row


class RowTile(NamedTuple):
    """The tile that a program reads at a time: ``rows`` of a weight, ``columns`` of each; with so many warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int


# the fastest on an H200 over the shapes of 7B models: 91 % of the copy bandwidth for query, key and value, 96 % for gate and up
# (bench/results/2026-11-27-h200/layers.txt)
LINEAR = RowTile(16, 256, 4, 4)
GATED = RowTile(4, 1024, 4, 3)
MOST_LINEARS = 3  # that share a launch


@triton.jit
def _prologue(x_ptr, residual_ptr, sum_ptr, size, eps, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_X: tl.constexpr):
    """float32: what a row is multiplied by before the norm's weight; the first program writes the sum of x and residual."""
    scale = 1.0
    if NORM:
        kind: tl.constexpr = x_ptr.dtype.element_ty
        column = tl.arange(0, BLOCK_X)
        inside = column < size
        x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total = (x + tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)).to(kind)
            x = total.to(tl.float32)
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + column, total, mask=inside)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    return scale


@triton.jit
def _row_block(x_ptr, residual_ptr, norm_ptr, place, inside, scale, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """float32: the elements ``place`` of the row."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        if HAS_RESIDUAL:
            x = (x + tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        weight = tl.load(norm_ptr + place, mask=inside, other=0.0).to(tl.float32)
        x = scale_row(x, scale, weight, kind, NORM == 2).to(tl.float32)
    return x


@triton.jit
def linear_kernel(
    x_ptr, residual_ptr, norm_ptr, sum_ptr,
    weight0_ptr, weight1_ptr, weight2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, output0_ptr, output1_ptr, output2_ptr,
    size, count0, count1, count2, stride0, stride1, stride2, blocks0, blocks1, eps,
    HAS_BIAS0: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Up to three weights ``[count, size]`` times one row; the blocks of the second follow those of the first."""
    block = tl.program_id(0)
    if PDL:
        if PARTS == 1 or block < blocks0:
            fetch_ahead(weight0_ptr, block * BLOCK_N, count0, size, stride0, BLOCK_N, LINES)
        elif PARTS == 2 or block < blocks0 + blocks1:
            fetch_ahead(weight1_ptr, (block - blocks0) * BLOCK_N, count1, size, stride1, BLOCK_N, LINES)
        else:
            fetch_ahead(weight2_ptr, (block - blocks0 - blocks1) * BLOCK_N, count2, size, stride2, BLOCK_N, LINES)
    follow(PDL)
    scale = _prologue(x_ptr, residual_ptr, sum_ptr, size, eps, NORM, HAS_RESIDUAL, BLOCK_X)
    if PARTS == 1 or block < blocks0:
        first = block * BLOCK_N
        _linear(
            x_ptr, residual_ptr, norm_ptr, weight0_ptr, bias0_ptr, output0_ptr, first, count0, size, stride0, scale,
            HAS_BIAS0, NORM, HAS_RESIDUAL, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    elif PARTS == 2 or block < blocks0 + blocks1:
        first = (block - blocks0) * BLOCK_N
        _linear(
            x_ptr, residual_ptr, norm_ptr, weight1_ptr, bias1_ptr, output1_ptr, first, count1, size, stride1, scale,
            HAS_BIAS1, NORM, HAS_RESIDUAL, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        first = (block - blocks0 - blocks1) * BLOCK_N
        _linear(
            x_ptr, residual_ptr, norm_ptr, weight2_ptr, bias2_ptr, output2_ptr, first, count2, size, stride2, scale,
            HAS_BIAS2, NORM, HAS_RESIDUAL, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip


@triton.jit
def _linear(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, output_ptr, first, count, size, stride_w, scale,
    HAS_BIAS: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    rows = weight_ptr + row.to(tl.int64)[:, None] * stride_w
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        place = begin + column
        inside = place < size
        x = _row_block(x_ptr, residual_ptr, norm_ptr, place, inside, scale, NORM, HAS_RESIDUAL)
        weight = tl.load(rows + place[None, :], mask=(row < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += weight * x[None, :]
    result = tl.sum(sums, 1)
    if HAS_BIAS:
        result += tl.load(bias_ptr + row, mask=row < count, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, result.to(output_ptr.dtype.element_ty), mask=row < count)


@triton.jit
def gated_kernel(
    x_ptr, residual_ptr, norm_ptr, sum_ptr, gate_ptr, up_ptr, output_ptr, size, count, stride_g, stride_u, eps,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``activation(gate row) * (up row)`` for one row and weights ``[count, size]``."""
    first = tl.program_id(0) * BLOCK_N
    if PDL:
        fetch_ahead(gate_ptr, first, count, size, stride_g, BLOCK_N, LINES)
        fetch_ahead(up_ptr, first, count, size, stride_u, BLOCK_N, LINES)
    follow(PDL)
    scale = _prologue(x_ptr, residual_ptr, sum_ptr, size, eps, NORM, HAS_RESIDUAL, BLOCK_X)
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    wide = row.to(tl.int64)[:, None]
    gates = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        place = begin + column
        inside = place < size
        read = (row < count)[:, None] & inside[None, :]
        x = _row_block(x_ptr, residual_ptr, norm_ptr, place, inside, scale, NORM, HAS_RESIDUAL)
        gates += tl.load(gate_ptr + wide * stride_g + place[None, :], mask=read, other=0.0).to(tl.float32) * x[None, :]
        ups += tl.load(up_ptr + wide * stride_u + place[None, :], mask=read, other=0.0).to(tl.float32) * x[None, :]
    kind: tl.constexpr = output_ptr.dtype.element_ty
    gate = tl.sum(gates, 1).to(kind).to(tl.float32)
    up = tl.sum(ups, 1).to(kind).to(tl.float32)
    tl.store(output_ptr + row, apply_gate(gate, up, kind, ACTIVATION), mask=row < count)


class Norm(NamedTuple):
    """The norm before a product: ``residual + x`` (where there is a residual), then RMSNorm."""

    residual: Tensor | None
    weight: Tensor
    eps: float
    one_plus: bool
    total: Tensor | None  # where the sum is written; None: a new tensor


def _shape(tile: RowTile, size: int, itemsize: int) -> tuple[int, int]:
    """(columns, lines of a row that are fetched ahead: those that fill the pipeline)."""
    columns = min(tile.columns, max(triton.next_power_of_2(size), 16))
    return columns, max(triton.next_power_of_2(columns * tile.stages * itemsize // 128), 1)


def _before(x: Tensor, norm: Norm | None) -> tuple[tuple[Tensor | None, ...], float, tuple[int, bool, int], Tensor]:
    """(x, residual, weight and sum as the kernels take them; eps; NORM, HAS_RESIDUAL and BLOCK_X; the sum)."""
    x = x.contiguous()
    if norm is None:
        return (x, None, None, None), 0.0, (0, False, 16), x
    flags = (2 if norm.one_plus else 1, norm.residual is not None, max(triton.next_power_of_2(x.shape[-1]), 16))
    if norm.residual is None:
        return (x, None, norm.weight.contiguous(), None), norm.eps, flags, x
    total = torch.empty_like(x) if norm.total is None else norm.total
    return (x, norm.residual.contiguous(), norm.weight.contiguous(), total), norm.eps, flags, total


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norm: Norm | None = None) -> tuple[Tensor, list[Tensor]]:
    """(the sum, the product with each of at most ``MOST_LINEARS`` weights) for x of one row."""
    size, parts = x.shape[-1], len(weights)
    columns, lines = _shape(LINEAR, size, x.element_size())
    before, eps, flags, total = _before(x, norm)
    outputs = [torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    none = [None] * (MOST_LINEARS - parts)
    counts = [weight.shape[0] for weight in weights]
    blocks = [triton.cdiv(count, LINEAR.rows) for count in counts]
    zeros = [0] * len(none)
    rest = (
        size, *counts, *zeros, *(weight.stride(0) for weight in weights), *zeros, *(blocks + zeros)[:2], eps,
        *(bias is not None for bias in biases), *(False for _ in none), *flags[:2], parts, flags[2],
        LINEAR.rows, columns, LINEAR.stages, lines,
    )  # fmt: skip
    tensors = (*before, *weights, *none, *biases, *none, *outputs, *none)
    start(linear_kernel, x.device, (sum(blocks), 1, 1), rest, LINEAR.warps, tensors, x.dtype)
    return total, outputs


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: str, norm: Norm | None = None) -> tuple[Tensor, Tensor]:
    """(the sum, the gated product) for x of one row."""
    size, count = x.shape[-1], gate.shape[0]
    columns, lines = _shape(GATED, size, x.element_size())
    before, eps, flags, total = _before(x, norm)
    output = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    rest = (
        size, count, gate.stride(0), up.stride(0), eps, activation_number(activation), *flags, GATED.rows, columns, GATED.stages, lines,
    )  # fmt: skip
    grid = (triton.cdiv(count, GATED.rows), 1, 1)
    start(gated_kernel, x.device, grid, rest, GATED.warps, (*before, gate, up, output), x.dtype)
    return total, output
