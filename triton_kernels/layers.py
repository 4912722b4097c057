"""What a decoder layer does around its attention, in few launches: RMSNorm, gated SiLU, rotary embedding, and its matrix products where
the batch is one row.

A model that launches these operation by operation spends more of a decode step on them than on attention (bench/results). A product with
one row is nothing but reading the weights: here several matrices share a launch, and each program reads whole rows. The arithmetic is
float32, rounded to the tensors' dtype wherever the model's own chain of operations rounds, so that the results agree with it up to the
order of a sum and the last bit of an exponential. The reference is ``dyrate_kernels.ops.layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dependent import follow
from .launch import start


class Tile(NamedTuple):
    """What a program of the matrix products reads at a time: ``rows`` of a weight, ``columns`` of each; with so many warps and stages."""

    rows: int
    columns: int
    warps: int
    stages: int


# the fastest on an H200 over the shapes of 7B models: 91 % of the copy bandwidth for query, key and value, 96 % for gate and up
# (bench/results/2026-11-27-h200/layers.txt)
LINEAR = Tile(16, 256, 4, 4)
GATED = Tile(4, 1024, 4, 3)
MOST_LINEARS = 3  # that share a launch


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, output_ptr, size, stride_x, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row of ``size`` elements; rows of x are ``stride_x`` apart, those of output lie densely."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    kind: tl.constexpr = output_ptr.dtype.element_ty
    normal = (x * scale).to(kind).to(tl.float32)
    tl.store(output_ptr + row * size + column, (normal * weight).to(kind), mask=inside)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, output_ptr, count, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """``silu(gate) * up`` of ``count`` elements that lie densely."""
    follow(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    kind: tl.constexpr = output_ptr.dtype.element_ty
    active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(output_ptr + place, (active * up).to(kind), mask=inside)


@triton.jit
def rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    columns, heads, kv_heads, half,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_cb, stride_cs, stride_sb, stride_ss,
    QUERY_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * S, blocks of query heads, then of key heads). Elements of a head are adjacent; outputs lie as ``[B, S, H, D]``."""
    follow(PDL)
    b = (tl.program_id(0) // columns).to(tl.int64)
    s = (tl.program_id(0) % columns).to(tl.int64)
    block = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    inside = place < half
    cos_row = cos_ptr + b * stride_cb + s * stride_cs
    sin_row = sin_ptr + b * stride_sb + s * stride_ss
    cos_low = tl.load(cos_row + place, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_row + half + place, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_row + place, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_row + half + place, mask=inside, other=0.0).to(tl.float32)
    if block < QUERY_BLOCKS:
        source = query_ptr + b * stride_qb + s * stride_qs
        target = query_out_ptr + (b * columns + s) * heads * 2 * half
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        many = heads
        stride_h = stride_qh
    else:
        source = key_ptr + b * stride_kb + s * stride_ks
        target = key_out_ptr + (b * columns + s) * kv_heads * 2 * half
        head = (block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        many = kv_heads
        stride_h = stride_kh
    read = (head < many)[:, None] & inside[None, :]
    wide = head.to(tl.int64)[:, None]
    low = tl.load(source + wide * stride_h + place[None, :], mask=read, other=0.0).to(tl.float32)
    high = tl.load(source + wide * stride_h + half + place[None, :], mask=read, other=0.0).to(tl.float32)
    kind: tl.constexpr = query_out_ptr.dtype.element_ty
    first = (low * cos_low[None, :]).to(kind).to(tl.float32) + (-high * sin_low[None, :]).to(kind).to(tl.float32)
    second = (high * cos_high[None, :]).to(kind).to(tl.float32) + (low * sin_high[None, :]).to(kind).to(tl.float32)
    tl.store(target + wide * 2 * half + place[None, :], first.to(kind), mask=read)
    tl.store(target + wide * 2 * half + half + place[None, :], second.to(kind), mask=read)


@triton.jit
def _row_products(x_ptr, weight_ptr, first, count, size, stride_w, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """float32 ``[BLOCK_N]``: the products of x with the rows ``first ..`` of a weight."""
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    rows = weight_ptr + row.to(tl.int64)[:, None] * stride_w
    sums = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        place = begin + column
        inside = place < size
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(rows + place[None, :], mask=(row < count)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += weight * x[None, :]
    return tl.sum(sums, 1)


@triton.jit
def linear_kernel(
    x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, output0_ptr, output1_ptr, output2_ptr,
    size, count0, count1, count2, stride0, stride1, stride2, blocks0, blocks1,
    HAS_BIAS0: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Up to three weights ``[count, size]`` times one row x; the blocks of the second follow those of the first."""
    follow(PDL)
    block = tl.program_id(0)
    if PARTS == 1 or block < blocks0:
        _linear(x_ptr, weight0_ptr, bias0_ptr, output0_ptr, block * BLOCK_N, count0, size, stride0, HAS_BIAS0, BLOCK_N, BLOCK_K, STAGES)
    elif PARTS == 2 or block < blocks0 + blocks1:
        first = (block - blocks0) * BLOCK_N
        _linear(x_ptr, weight1_ptr, bias1_ptr, output1_ptr, first, count1, size, stride1, HAS_BIAS1, BLOCK_N, BLOCK_K, STAGES)
    else:
        first = (block - blocks0 - blocks1) * BLOCK_N
        _linear(x_ptr, weight2_ptr, bias2_ptr, output2_ptr, first, count2, size, stride2, HAS_BIAS2, BLOCK_N, BLOCK_K, STAGES)


@triton.jit
def _linear(
    x_ptr, weight_ptr, bias_ptr, output_ptr, first, count, size, stride_w,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    result = _row_products(x_ptr, weight_ptr, first, count, size, stride_w, BLOCK_N, BLOCK_K, STAGES)
    row = first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        result += tl.load(bias_ptr + row, mask=row < count, other=0.0).to(tl.float32)
    tl.store(output_ptr + row, result.to(output_ptr.dtype.element_ty), mask=row < count)


@triton.jit
def gated_kernel(
    x_ptr, gate_ptr, up_ptr, output_ptr, size, count, stride_g, stride_u,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``silu(gate x) * (up x)`` for one row x and weights ``[count, size]``."""
    follow(PDL)
    first = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    wide = row.to(tl.int64)[:, None]
    gates = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    ups = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for begin in tl.range(0, size, BLOCK_K, num_stages=STAGES):
        place = begin + column
        inside = place < size
        read = (row < count)[:, None] & inside[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gates += tl.load(gate_ptr + wide * stride_g + place[None, :], mask=read, other=0.0).to(tl.float32) * x[None, :]
        ups += tl.load(up_ptr + wide * stride_u + place[None, :], mask=read, other=0.0).to(tl.float32) * x[None, :]
    kind: tl.constexpr = output_ptr.dtype.element_ty
    gate = tl.sum(gates, 1).to(kind).to(tl.float32)
    up = tl.sum(ups, 1).to(kind).to(tl.float32)
    active = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(output_ptr + row, (active * up).to(kind), mask=row < count)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """See ``dyrate_kernels.ops.layers.linears``: x is one row, and at most ``MOST_LINEARS`` weights share the launch."""
    size, parts = x.shape[-1], len(weights)
    rows, columns, warps, stages = LINEAR
    columns = min(columns, max(triton.next_power_of_2(size), 16))
    x = x.contiguous()
    outputs = [torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device) for weight in weights]
    none = [None] * (MOST_LINEARS - parts)
    counts = [weight.shape[0] for weight in weights]
    blocks = [triton.cdiv(count, rows) for count in counts]
    zeros = [0] * len(none)
    rest = (
        size, *counts, *zeros, *(weight.stride(0) for weight in weights), *zeros, *(blocks + zeros)[:2],
        *(bias is not None for bias in biases), *(False for _ in none), parts, rows, columns, stages,
    )  # fmt: skip
    tensors = (x, *weights, *none, *biases, *none, *outputs, *none)
    start(linear_kernel, x.device, (sum(blocks), 1, 1), rest, warps, tensors, x.dtype)
    return outputs


def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """See ``dyrate_kernels.ops.layers.gated``: x is one row."""
    size, count = x.shape[-1], gate.shape[0]
    rows, columns, warps, stages = GATED
    columns = min(columns, max(triton.next_power_of_2(size), 16))
    output = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
    rest = (size, count, gate.stride(0), up.stride(0), rows, columns, stages)
    start(gated_kernel, x.device, (triton.cdiv(count, rows), 1, 1), rest, warps, (x.contiguous(), gate, up, output), x.dtype)
    return output


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``dyrate_kernels.ops.layers.rms_norm``."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)  # a view, or a copy where no view can be
    rows = rows if rows.stride(-1) == 1 or size == 1 else rows.contiguous()
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if output.numel():
        block = max(triton.next_power_of_2(size), 16)
        rest = (size, rows.stride(0), eps, block)
        warps = min(max(block // 512, 1), 16)
        start(rms_norm_kernel, x.device, (rows.shape[0], 1, 1), rest, warps, (rows, weight.contiguous(), output), x.dtype, weight.dtype)
    return output


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See ``dyrate_kernels.ops.layers.silu_mul``."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    count = gate.numel()
    if count:
        block = 1024
        start(silu_mul_kernel, gate.device, (triton.cdiv(count, block), 1, 1), (count, block), 4, (gate, up, output), gate.dtype)
    return output


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.layers.rotate``."""
    batch, heads, columns, dim = query.shape
    kv_heads = key.shape[1]
    rotated = tuple(
        torch.empty(batch, columns, tensor.shape[1], dim, dtype=query.dtype, device=query.device).transpose(1, 2) for tensor in (query, key)
    )
    if query.numel() == 0:
        return rotated
    query, key, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, cos, sin))
    block = max(triton.next_power_of_2(dim // 2), 16)
    block_h = max(min(1024 // block, triton.next_power_of_2(max(heads, kv_heads))), 1)
    query_blocks = triton.cdiv(heads, block_h)
    shared = [0 if tensor.shape[0] == 1 else tensor.stride(0) for tensor in (cos, sin)]
    rest = (
        columns, heads, kv_heads, dim // 2, *query.stride()[:3], *key.stride()[:3],
        shared[0], cos.stride(1), shared[1], sin.stride(1), query_blocks, block_h, block,
    )  # fmt: skip
    grid = (batch * columns, query_blocks + triton.cdiv(kv_heads, block_h), 1)
    start(rotate_kernel, query.device, grid, rest, 4, (query, key, cos, sin, *rotated), query.dtype, key.dtype, cos.dtype)
    return rotated
