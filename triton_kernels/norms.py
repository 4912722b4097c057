"""RMSNorm: of rows, and of the sum of a residual stream and what a block adds to it, which is needed further on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyrate_kernels.ops import layers as reference

from .dependent import follow
from .launch import start


@triton.jit
def normalise(x, weight, size, eps, kind: tl.constexpr, ONE_PLUS: tl.constexpr):
    """float32 values of one row of ``size`` elements (zeros past them), normalised, in ``kind`` and rounded to it where a model rounds.

    ONE_PLUS: Gemma's, ``1 + weight`` and one rounding; else Llama's, which rounds before it multiplies.
    """
    return scale_row(x, 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps), weight, kind, ONE_PLUS)


@triton.jit
def scale_row(x, scale, weight, kind: tl.constexpr, ONE_PLUS: tl.constexpr):
    """``normalise`` for a known scale."""
    if ONE_PLUS:
        return (x * scale * (1.0 + weight)).to(kind)
    else:
        return ((x * scale).to(kind).to(tl.float32) * weight).to(kind)


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, output_ptr, size, stride_x, eps, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program a row of ``size`` elements; rows of x are ``stride_x`` apart, those of output lie densely."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * size + column, normalise(x, weight, size, eps, output_ptr.dtype.element_ty, ONE_PLUS), mask=inside)


@triton.jit
def residual_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, before_ptr, sum_ptr, output_ptr, size, stride_x, stride_r, eps,
    HAS_BEFORE: tl.constexpr, ONE_PLUS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``rms_norm_kernel`` of ``residual + x``, which is written too; HAS_BEFORE: x is normalised before it is added."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    kind: tl.constexpr = output_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BEFORE:
        before = tl.load(before_ptr + column, mask=inside, other=0.0).to(tl.float32)
        x = normalise(x, before, size, eps, kind, ONE_PLUS).to(tl.float32)
    total = (residual + x).to(kind)
    tl.store(sum_ptr + row * size + column, total, mask=inside)
    tl.store(output_ptr + row * size + column, normalise(total.to(tl.float32), weight, size, eps, kind, ONE_PLUS), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """``[rows, size]`` with adjacent elements in a row: a view, or a copy where no view can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _block(size: int) -> tuple[int, int]:
    """(elements of a row's block, warps)."""
    block = max(triton.next_power_of_2(size), 16)
    return block, min(max(block // 512, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, one_plus: bool = False) -> Tensor:
    """See ``dyrate_kernels.ops.layers.rms_norm``."""
    if x.dtype == torch.float64:
        return reference.rms_norm(x, weight, eps, one_plus)
    size = x.shape[-1]
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if output.numel():
        rows, (block, warps) = _rows(x), _block(size)
        rest = (size, rows.stride(0), eps, one_plus, block)
        tensors = (rows, weight.contiguous(), output)
        start(rms_norm_kernel, x.device, (rows.shape[0], 1, 1), rest, warps, tensors, x.dtype, weight.dtype)
    return output


def residual_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, one_plus: bool = False, before: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.layers.residual_norm``."""
    if x.dtype == torch.float64:
        return reference.residual_norm(x, residual, weight, eps, one_plus, before)
    size = x.shape[-1]
    total, output = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if output.numel():
        rows, others, (block, warps) = _rows(x), _rows(residual), _block(size)
        rest = (size, rows.stride(0), others.stride(0), eps, before is not None, one_plus, block)
        tensors = (rows, others, weight.contiguous(), None if before is None else before.contiguous(), total, output)
        start(residual_norm_kernel, x.device, (rows.shape[0], 1, 1), rest, warps, tensors, x.dtype)
    return total, output
