"""Programmatic dependent launch: the next kernel of a stream gets on its way while this one still runs (sm_90 and later).

It may start once every program of the kernel before has called ``follow`` or ended, so its own launch costs nothing; but what that kernel
and all before it have written may be read, and what they read or use as scratch memory may be written, only after ``follow``. A kernel
that did not wait would break that for all after it: every launched kernel calls ``follow`` before it touches memory, weights that it
fetches ahead excepted (``tests/launch/test_dependent_launch.py`` reads them all). ``launch.dependent_launch`` says whether it is on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(PDL: tl.constexpr):
    """Waits until all launches before this one are done, and lets the next one get on its way."""
    if PDL:
        # what triton.language.extra.cuda has under these names does not compile on Triton 3.4
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_ahead(weight_ptr, first, count, size, stride_w, BLOCK_N: tl.constexpr, LINES: tl.constexpr):
    """Asks for the first ``LINES`` lines of 128 bytes of the rows ``first ..`` of a weight ``[count, size]`` in the L2 cache.

    Before ``follow``: while the launches before still run. Weights are written by none of them.
    """
    PER_LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.minimum(first + tl.arange(0, BLOCK_N), count - 1)
    column = tl.minimum(tl.arange(0, LINES) * PER_LINE, size - 1)
    places = weight_ptr + row.to(tl.int64)[:, None] * stride_w + column[None, :]
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1)
