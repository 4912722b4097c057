"""Kernels that move rows in place: hole filling for eviction, reordering for beams. Many tensors in one launch.

The tensors of a launch are described by a table int64 ``[T, 6]`` on the device, in units of WORD bytes: address, stride of a sequence,
stride of a head, stride of a row, heads, words of a row. A row's words are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dependent import follow

SEQUENCE, HEAD, ROW, HEADS, WORDS = (tl.constexpr(i) for i in range(1, 6))  # columns of the table; 0 is the address
FIELDS = 6


@triton.jit
def _pointer(table_ptr, tensor, WORD: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(table_ptr + tensor * 6)
    if WORD == 4:
        pointer = address.to(tl.pointer_type(tl.int32), bitcast=True)
    elif WORD == 2:
        pointer = address.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        pointer = address.to(tl.pointer_type(tl.int8), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def compact_kernel(
    table_ptr, kept_ptr, n_kept_ptr, n_visual_ptr, stride_kb,
    WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, STEPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid ``(B, blocks of moves, T)``. kept int32 ascending; STEPS: halvings that a search in the longest list takes.

    With n rows kept, the kept rows at or past n move, in order, into the rows below n that are not kept, in order. The i-th of these holes
    is ``i + (how many kept rows come before it)``, found by bisection, so every program finds its own moves and no two touch a common row.
    """
    follow(PDL)
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(n_kept_ptr + b)
    if n >= tl.load(n_visual_ptr + b):
        return
    kept = kept_ptr + b * stride_kb
    low = 0
    high = n
    for _ in range(STEPS):  # how many kept rows lie below n
        middle = (low + high) // 2
        row = tl.load(kept + middle, mask=low < high, other=0)
        right = (low < high) & (row < n)
        high = tl.where((low < high) & (row >= n), middle, high)
        low = tl.where(right, middle + 1, low)
    stay = low
    moves = n - stay
    tensor = tl.program_id(2)
    pointer = _pointer(table_ptr, tensor, WORD, ALIGNED)
    fields = table_ptr + tensor * 6
    stride_b = tl.load(fields + SEQUENCE)
    stride_h = tl.load(fields + HEAD)
    stride_r = tl.load(fields + ROW)
    heads = tl.load(fields + HEADS).to(tl.int32)
    words = tl.load(fields + WORDS).to(tl.int32)
    if ALIGNED:
        stride_b = tl.multiple_of(stride_b, 16)
        stride_h = tl.multiple_of(stride_h, 16)
        stride_r = tl.multiple_of(stride_r, 16)
        words = tl.multiple_of(words, 4)
    word = tl.arange(0, BLOCK_W)
    for start in range(tl.program_id(1) * BLOCK_M, moves, tl.num_programs(1) * BLOCK_M):
        move = start + tl.arange(0, BLOCK_M)
        real = move < moves
        source = tl.load(kept + stay + move, mask=real, other=0).to(tl.int64)
        first = tl.zeros([BLOCK_M], dtype=tl.int32)
        last = first + stay
        for _ in range(STEPS):  # how many kept rows come before this hole
            middle = (first + last) // 2
            open = first < last
            row = tl.load(kept + middle, mask=open, other=0)
            before = open & (row - middle <= move)
            last = tl.where(open & (row - middle > move), middle, last)
            first = tl.where(before, middle + 1, first)
        target = (move + first).to(tl.int64)
        for head in range(heads):
            base = pointer + b * stride_b + head * stride_h
            for start_word in range(0, words, BLOCK_W):
                place = start_word + word
                mask = real[:, None] & (place < words)[None, :]
                x = tl.load(base + source[:, None] * stride_r + place[None, :], mask=mask, other=0)
                tl.store(base + target[:, None] * stride_r + place[None, :], x, mask=mask)


@triton.jit
def reorder_kernel(
    table_ptr, index_ptr, batch,
    WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid ``(blocks of words, T)``: sequence i becomes the former sequence ``index[i]``. WORDS are those of a whole sequence here.

    One program holds the same words of all sequences at once: it reads them all, then writes them, so no second buffer is needed.
    """
    follow(PDL)
    tensor = tl.program_id(1)
    pointer = _pointer(table_ptr, tensor, WORD, ALIGNED)
    fields = table_ptr + tensor * 6
    stride_b = tl.load(fields + SEQUENCE)
    words = tl.load(fields + WORDS)
    if ALIGNED:
        stride_b = tl.multiple_of(stride_b, 16)
        words = tl.multiple_of(words, 4)
    sequence = tl.arange(0, BLOCK_B)
    source = tl.load(index_ptr + sequence, mask=sequence < batch, other=0)
    moved = (sequence < batch) & (source != sequence)
    if tl.sum(moved.to(tl.int32), 0) == 0:
        return
    for start in range(tl.program_id(0) * BLOCK_W, words, tl.num_programs(0) * BLOCK_W):
        place = start + tl.arange(0, BLOCK_W).to(tl.int64)
        mask = moved[:, None] & (place < words)[None, :]
        x = tl.load(pointer + source[:, None] * stride_b + place[None, :], mask=mask, other=0)
        tl.debug_barrier()  # all reads come before the first write
        tl.store(pointer + sequence[:, None].to(tl.int64) * stride_b + place[None, :], x, mask=mask)
