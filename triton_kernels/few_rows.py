"""Matrix products with two to 64 rows on tensor cores: weights are the side of 64 rows, the rows of x the narrow one.

Such a product still is little but reading the weights, so a program reads its rows of a weight once, for all rows of x, in a deep pipeline.
Several weights share a launch, as with one row; gate and up share a program, which applies the gate. Where one wave of programs would leave
multiprocessors idle, SPLITS programs share the columns of a block: each writes its partial sums, and the last to finish adds them in the
order of the splits, so that results do not depend on which it was.

Any size is right; where it is no multiple of 16, Triton reads 16-bit weights one by one and without a pipeline: no such shape belongs
into a device's file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyrate_kernels.ops import workspace
from dyrate_kernels.ops.forms import stream_of
from dyrate_kernels.ops.layer_settings import Tile
from dyrate_kernels.ops.layers import activation_number

from .attention import _finished
from .dependent import fetch_ahead, follow
from .gates import apply_gate
from .launch import start

MOST_LINEARS = 3  # that share a launch
ROOM = 96 * 1024  # bytes of shared memory that a pipeline may take where no device's file says how deep it is


@triton.jit
def _product(weights, x, acc, place, size, EVEN: tl.constexpr):
    """``acc`` and the products of columns ``place`` of a weight's rows with x ``[BLOCK_K, BLOCK_M]``."""
    if EVEN:
        weight = tl.load(weights + place[None, :])
    else:
        weight = tl.load(weights + place[None, :], mask=(place < size)[None, :], other=0.0)
    if weight.dtype == tl.float32:
        return tl.dot(weight, x, acc, input_precision="ieee")
    else:
        return tl.dot(weight, x, acc)


@triton.jit
def few_rows_kernel(  # noqa: C901 - its branches are constants of a compilation
    x_ptr, weight0_ptr, weight1_ptr, weight2_ptr, bias0_ptr, bias1_ptr, bias2_ptr, output0_ptr, output1_ptr, output2_ptr,
    part_ptr, counter_ptr,
    rows, size, count0, count1, count2, stride0, stride1, stride2, blocks0, blocks1,
    HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of all weights, SPLITS). x ``[rows, size]`` and outputs ``[rows, count]`` dense.

    GATED: weight 0 is the gate's and 1 up's. HAS_BIAS: every weight has one.
    Scratch: part float32 ``[SPLITS, blocks, 1 or 2, BLOCK_N, BLOCK_M]``; counter int32 ``[blocks]``, zero before and after.
    """
    block = tl.program_id(0)
    split = tl.program_id(1)
    weight_ptr = weight0_ptr
    bias_ptr = bias0_ptr
    output_ptr = output0_ptr
    first = block * BLOCK_N
    count = count0
    stride_w = stride0
    if PARTS > 1:
        second = block >= blocks0
        weight_ptr = tl.where(second, weight1_ptr, weight_ptr)
        output_ptr = tl.where(second, output1_ptr, output_ptr)
        if HAS_BIAS:
            bias_ptr = tl.where(second, bias1_ptr, bias_ptr)
        first = tl.where(second, (block - blocks0) * BLOCK_N, first)
        count = tl.where(second, count1, count)
        stride_w = tl.where(second, stride1, stride_w)
    if PARTS > 2:
        third = block >= blocks0 + blocks1
        weight_ptr = tl.where(third, weight2_ptr, weight_ptr)
        output_ptr = tl.where(third, output2_ptr, output_ptr)
        if HAS_BIAS:
            bias_ptr = tl.where(third, bias2_ptr, bias_ptr)
        first = tl.where(third, (block - blocks0 - blocks1) * BLOCK_N, first)
        count = tl.where(third, count2, count)
        stride_w = tl.where(third, stride2, stride_w)
    pieces = tl.cdiv(size, BLOCK_K)
    begin = (pieces * split) // SPLITS * BLOCK_K
    end = (pieces * (split + 1)) // SPLITS * BLOCK_K
    if PDL:
        fetch_ahead(weight_ptr + begin, first, count, size - begin, stride_w, BLOCK_N, LINES)
        if GATED:
            fetch_ahead(weight1_ptr + begin, first, count, size - begin, stride1, BLOCK_N, LINES)
    follow(PDL)

    offset_n = tl.arange(0, BLOCK_N)
    offset_m = tl.arange(0, BLOCK_M)
    row = first + offset_n
    # rows past the last one read the last one again: their results are written nowhere, and no load needs a mask for them
    wide = tl.minimum(row, count - 1).to(tl.int64)[:, None]
    weights = weight_ptr + wide * stride_w
    lines = x_ptr + tl.minimum(offset_m, rows - 1).to(tl.int64)[None, :] * size
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    if GATED:
        ups = weight1_ptr + wide * stride1
        acc_up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start_k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        place = start_k + tl.arange(0, BLOCK_K)
        if EVEN:
            x = tl.load(lines + place[:, None])
        else:
            x = tl.load(lines + place[:, None], mask=(place < size)[:, None], other=0.0)
        acc = _product(weights, x, acc, place, size, EVEN)
        if GATED:
            acc_up = _product(ups, x, acc_up, place, size, EVEN)

    if SPLITS > 1:
        TILES: tl.constexpr = 2 if GATED else 1
        blocks = tl.num_programs(0)
        inner = offset_n[:, None] * BLOCK_M + offset_m[None, :]
        own = part_ptr + (split.to(tl.int64) * blocks + block) * (TILES * BLOCK_N * BLOCK_M) + inner
        tl.store(own, acc)
        if GATED:
            tl.store(own + BLOCK_N * BLOCK_M, acc_up)
        if not _finished(counter_ptr + block, SPLITS - 1):
            return
        acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        if GATED:
            acc_up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for other in tl.static_range(SPLITS):
            part = part_ptr + (blocks.to(tl.int64) * other + block) * (TILES * BLOCK_N * BLOCK_M) + inner
            acc += tl.load(part, cache_modifier=".cg")
            if GATED:
                acc_up += tl.load(part + BLOCK_N * BLOCK_M, cache_modifier=".cg")

    kind: tl.constexpr = output0_ptr.dtype.element_ty
    if GATED:
        result = apply_gate(acc.to(kind).to(tl.float32), acc_up.to(kind).to(tl.float32), kind, ACTIVATION)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row, mask=row < count, other=0.0).to(tl.float32)[:, None]
        result = acc.to(kind)
    written = (row < count)[:, None] & (offset_m < rows)[None, :]
    tl.store(output_ptr + offset_m.to(tl.int64)[None, :] * count + row[:, None], result, mask=written)


def shape(tile: Tile | None, rows: int, size: int, itemsize: int, weights: int) -> tuple[int, int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, splits) for a program that reads ``weights`` weights.

    Where the tile leaves it open: 64 rows of a weight, which is what ``wgmma`` multiplies on sm_90, 256 bytes of each, and as many of those
    (four at most) on their way as fit the smallest shared memory of a supported GPU.
    """
    tile = tile or Tile()
    block_m = max(triton.next_power_of_2(rows), 16)
    block_n = tile.rows or 64
    block_k = tile.columns or 256 // itemsize // weights
    block_k = min(block_k, max(triton.next_power_of_2(size), 16))
    stage = (weights * block_n + block_m) * block_k * itemsize
    stages = tile.stages or max(min(ROOM // stage, 4), 1)
    return block_m, block_n, block_k, tile.warps or 4, stages, min(tile.splits or 1, triton.cdiv(size, block_k))


def few_rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str | None = None, tile: Tile | None = None
) -> list[Tensor]:
    """``x weight^T + bias`` for at most ``MOST_LINEARS`` weights; or, with an ``activation``, the gated product of two, alone in the list.

    x: ``[.., K]``, of at most ``ops.layers.MOST_ROWS`` rows. Where some weights have a bias and some have none, each is a launch.
    """
    if len({bias is None for bias in biases}) == 2:
        return [few_rows(x, [weight], [bias], tile=tile)[0] for weight, bias in zip(weights, biases, strict=True)]
    size, gated = x.shape[-1], activation is not None
    rows = x.numel() // size
    block_m, block_n, block_k, warps, stages, splits = shape(tile, rows, size, x.element_size(), 2 if gated else 1)
    counts = [weight.shape[0] for weight in weights]
    outputs = [torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device) for count in counts[: 1 if gated else None]]
    none = [None] * (MOST_LINEARS - len(weights))
    zeros = [0] * len(none)
    blocks = [triton.cdiv(count, block_n) for count in counts]
    programs = blocks[0] if gated else sum(blocks)
    lines = max(triton.next_power_of_2(block_k * stages * x.element_size() // 128), 1)
    rest = (
        rows, size, *counts, *zeros, *(weight.stride(0) for weight in weights), *zeros, *(blocks + zeros)[:2],
        biases[0] is not None, 1 if gated else len(weights), gated, activation_number(activation) if activation else 0,
        size % block_k == 0, splits, block_m, block_n, block_k, stages, lines,
    )  # fmt: skip
    part = counters = None
    if splits > 1:
        sizes: dict[str, int | None] = {"part": splits * programs * (2 if gated else 1) * block_n * block_m, "counters": programs}
        part, counters = workspace.for_stream(x.device, stream_of(x.device)).buffers_for(sizes)
    outs = [*outputs, *[None] * (MOST_LINEARS - len(outputs))]
    tensors = (x.contiguous(), *weights, *none, *biases, *none, *outs, part, counters)
    start(few_rows_kernel, x.device, (programs, splits, 1), rest, warps, tensors, x.dtype, stages=stages)
    return outputs
