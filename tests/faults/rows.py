"""Compaction and reordering in Triton, with the host's part."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, HOST = "triton_kernels/rows.py", "triton_kernels/backend.py"


def fault(old: str, new: str, file: str = FILE) -> Fault:
    return Fault(file, old, new)


FAULTS = (
    fault("right = (low < high) & (row < n)", "right = (low < high) & (row <= n)"),
    fault("low = tl.where(right, middle + 1, low)", "low = tl.where(right, middle, low)"),
    fault("    moves = n - stay\n", "    moves = n - stay - 1\n"),
    fault("source = tl.load(kept + stay + move,", "source = tl.load(kept + move,"),
    fault("kept = kept_ptr + b * stride_kb", "kept = kept_ptr"),
    fault("before = open & (row - middle <= move)", "before = open & (row - middle < move)"),
    fault("first = tl.where(before, middle + 1, first)", "first = tl.where(before, middle, first)"),
    fault("target = (move + first).to(tl.int64)", "target = move.to(tl.int64)"),
    fault("base = pointer + b * stride_b + head * stride_h", "base = pointer + head * stride_h"),
    fault("base = pointer + b * stride_b + head * stride_h", "base = pointer + b * stride_b + head * words"),
    fault("tl.load(base + source[:, None] * stride_r", "tl.load(base + source[:, None] * words"),
    fault("tl.store(base + target[:, None] * stride_r", "tl.store(base + target[:, None] * words"),
    fault("mask = real[:, None] & (place < words)[None, :]", "mask = real[:, None] & (place <= words)[None, :]"),
    fault("mask = real[:, None] & (place < words)[None, :]", "mask = (place < words)[None, :]"),
    fault("real = move < moves", "real = move <= moves"),
    fault("for start_word in range(0, words, BLOCK_W)", "for start_word in range(0, BLOCK_W, BLOCK_W)"),
    fault("range(tl.program_id(1) * BLOCK_M, moves,", "range(0, moves,"),
    fault("heads = tl.load(fields + HEADS).to(tl.int32)", "heads = 1"),
    fault("stride_h = tl.load(fields + HEAD)\n", "stride_h = tl.load(fields + ROW)\n"),
    fault("tensor = tl.program_id(2)", "tensor = tl.program_id(2) * 0"),
    # reordering
    fault("tensor = tl.program_id(1)", "tensor = tl.program_id(1) * 0"),
    fault("moved = (sequence < batch) & (source != sequence)", "moved = (sequence < batch) & (source < sequence)"),
    fault("mask = moved[:, None] & (place < words)[None, :]", "mask = moved[:, None] & (place <= words)[None, :]"),
    fault("source = tl.load(index_ptr + sequence,", "source = tl.load(index_ptr + (sequence ^ 1),"),
    fault("tl.load(pointer + source[:, None] * stride_b", "tl.load(pointer + sequence[:, None] * stride_b"),
    fault("range(tl.program_id(0) * BLOCK_W, words,", "range(tl.program_id(0) * BLOCK_W, words - BLOCK_W,"),
    # the host's part
    fault("for part in (stride_b, stride_h, stride_r, words)) or", "for part in (stride_b, stride_h, stride_r)) or", HOST),
    fault("for part in (stride_b, stride_h, stride_r, words)) or", "for part in (stride_h, stride_r, words)) or", HOST),
    fault("if word != 1 and words != 1:", "if False:", HOST),
    fault("max(width.bit_length() + 1, 1)", "max(width.bit_length() - 1, 1)", HOST),
    fault("rest = (kept.stride(0), word,", "rest = (kept.shape[1], word,", HOST),
    fault("        if not tensor.is_contiguous():\n            others", "        if False:\n            others", HOST),
    fault("tensors = (table, kept, vector(n_kept), vector(n_visual))", "tensors = (table, kept, n_kept, vector(n_visual))", HOST),
    fault("(table, index.contiguous())", "(table, index)", HOST),
)  # fmt: skip

FAMILY = Family("interpreter", ("compact_", "reorder_"), 400, ("tests/ops/test_rows.py",), FAULTS)
