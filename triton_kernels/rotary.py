"""Rotary position embedding of queries and keys in one launch, after RMSNorm of each head where a model has that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dyrate_kernels.ops import layers as reference

from .dependent import follow
from .launch import start
from .norms import scale_row


@triton.jit
def rotate_part(x, other, cos, sin, kind: tl.constexpr):
    """Elements x of a head, rotated against those of its other half (negated for elements of the first half): of float32 values, in
    ``kind`` and rounded to it where a model rounds."""
    return ((x * cos).to(kind).to(tl.float32) + (other * sin).to(kind).to(tl.float32)).to(kind)


@triton.jit
def rotate_halves(low, high, cos_low, cos_high, sin_low, sin_high, kind: tl.constexpr):
    """Both halves of heads, rotated as ``rotate_part`` does."""
    return rotate_part(low, -high, cos_low, sin_low, kind), rotate_part(high, low, cos_high, sin_high, kind)


@triton.jit
def rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr, query_out_ptr, key_out_ptr,
    columns, heads, kv_heads, half,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_ci, stride_cb, stride_cs, stride_si, stride_sb, stride_ss,
    eps, second_stream, third_stream,
    HAS_NORM: tl.constexpr, ONE_PLUS: tl.constexpr, STREAMS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B * S, blocks of query heads, then of key heads). Elements of a head are adjacent; outputs lie as ``[B, S, H, D]``.

    STREAMS: cos and sin have three streams of positions; places of a half from ``second_stream`` on take the second, and so on.
    """
    follow(PDL)
    b = (tl.program_id(0) // columns).to(tl.int64)
    s = (tl.program_id(0) % columns).to(tl.int64)
    block = tl.program_id(1)
    place = tl.arange(0, BLOCK)
    inside = place < half
    cos_row = cos_ptr + b * stride_cb + s * stride_cs + place
    sin_row = sin_ptr + b * stride_sb + s * stride_ss + place
    if STREAMS:
        stream = (place >= second_stream).to(tl.int64) + (place >= third_stream).to(tl.int64)
        cos_row += stream * stride_ci
        sin_row += stream * stride_si
    cos_low = tl.load(cos_row, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_row + half, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_row, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_row + half, mask=inside, other=0.0).to(tl.float32)
    if block < QUERY_BLOCKS:
        source = query_ptr + b * stride_qb + s * stride_qs
        target = query_out_ptr + (b * columns + s) * heads * 2 * half
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        many = heads
        stride_h = stride_qh
        if HAS_NORM:
            norms = query_norm_ptr
    else:
        source = key_ptr + b * stride_kb + s * stride_ks
        target = key_out_ptr + (b * columns + s) * kv_heads * 2 * half
        head = (block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        many = kv_heads
        stride_h = stride_kh
        if HAS_NORM:
            norms = key_norm_ptr
    read = (head < many)[:, None] & inside[None, :]
    wide = head.to(tl.int64)[:, None]
    low = tl.load(source + wide * stride_h + place[None, :], mask=read, other=0.0).to(tl.float32)
    high = tl.load(source + wide * stride_h + half + place[None, :], mask=read, other=0.0).to(tl.float32)
    kind: tl.constexpr = query_out_ptr.dtype.element_ty
    if HAS_NORM:
        scale = 1.0 / tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * half) + eps)
        weight_low = tl.load(norms + place, mask=inside, other=0.0).to(tl.float32)
        weight_high = tl.load(norms + half + place, mask=inside, other=0.0).to(tl.float32)
        low = scale_row(low, scale[:, None], weight_low[None, :], kind, ONE_PLUS).to(tl.float32)
        high = scale_row(high, scale[:, None], weight_high[None, :], kind, ONE_PLUS).to(tl.float32)
    first, second = rotate_halves(low, high, cos_low[None, :], cos_high[None, :], sin_low[None, :], sin_high[None, :], kind)
    tl.store(target + wide * 2 * half + place[None, :], first, mask=read)
    tl.store(target + wide * 2 * half + half + place[None, :], second, mask=read)


def rotate(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    eps: float = 0.0,
    one_plus: bool = False,
    sections: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``dyrate_kernels.ops.layers.rotate``."""
    if query.dtype == torch.float64:
        return reference.rotate(query, key, cos, sin, query_norm, key_norm, eps, one_plus, sections)
    batch, heads, columns, dim = query.shape
    kv_heads = key.shape[1]
    rotated = (
        torch.empty(batch, columns, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2),
        torch.empty(batch, columns, kv_heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2),
    )
    if query.numel() == key.numel() == 0:
        return rotated
    query, key, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, cos, sin))
    block = max(triton.next_power_of_2(dim // 2), 16)
    block_h = max(min(1024 // block, triton.next_power_of_2(max(heads, kv_heads))), 1)
    query_blocks = triton.cdiv(heads, block_h)
    turns: list[int] = []
    for tensor in (cos, sin):
        shared = tensor.shape[-3] == 1
        turns += [0 if sections is None else tensor.stride(0), 0 if shared else tensor.stride(-3), tensor.stride(-2)]
    streams = (0, 0) if sections is None else (sections[0], sections[0] + sections[1])
    has_norm = query_norm is not None
    rest = (
        columns, heads, kv_heads, dim // 2, *query.stride()[:3], *key.stride()[:3], *turns, eps, *streams,
        has_norm, one_plus, sections is not None, query_blocks, block_h, block,
    )  # fmt: skip
    grid = (batch * columns, query_blocks + triton.cdiv(kv_heads, block_h), 1)
    norms = tuple(None if weight is None else weight.contiguous() for weight in (query_norm, key_norm))
    start(rotate_kernel, query.device, grid, rest, 4, (query, key, cos, sin, *norms, *rotated), query.dtype, key.dtype, cos.dtype)
    return rotated
