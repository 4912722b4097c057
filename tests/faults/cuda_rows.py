"""Compaction and reordering in CUDA C++, emulated, with the host's part."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, HOST = "csrc/rows.h", "dyrate_kernels/ops/cuda.py"


READ = "        if (word < words && call.index[b] != b) tile"
TILE = "      block.sync();\n      for (int i = block.thread(); i < call.batch * width"
BASE = "reinterpret_cast<char*>(rows.address) + b * rows.sequence_stride;\n    constexpr"
HELD = "*reinterpret_cast<Word*>(base + to + at[i]) = held[i];"


def fault(old: str, new: str, file: str = FILE, races: bool = False) -> Fault:
    return Fault(file, old, new, races)


FAULTS = (
    fault("if (kept[middle] < n) {", "if (kept[middle] <= n) {"),
    fault("return {kept, n, low};", "return {kept, n, n ? low + 1 : low};"),
    fault("return kept[stay + move];", "return kept[move];"),
    fault("if (kept[middle] - middle <= move) {", "if (kept[middle] - middle < move) {"),
    fault("return move + low;", "return move;"),
    fault("Holes::of(call.kept + b * call.kept_stride, n)", "Holes::of(call.kept, n)"),
    fault("call.rows[block.index().y];\n    char*", "call.rows[0];\n    char*"),
    fault(BASE, BASE.replace(" + b * rows.sequence_stride", "")),
    fault("block.grid().x) * kWarps * kBatch;", "block.grid().x) * kWarps * kBatch + 1;"),
    fault("* kWarps + block.warp()) * kBatch; first", "* kWarps + block.warp() / 2) * kBatch; first"),
    fault("if (block.lane() < kBatch && move < holes.moves()) {", "if (block.lane() + 1 < kBatch && move < holes.moves()) {"),
    fault("holes.moves() - first < kBatch ? holes.moves() - first : kBatch", "kBatch", races=True),
    fault("from = block.shuffle(source, i) * rows.row_stride", "from = block.shuffle(source, i) * rows.row_bytes"),
    fault("to = block.shuffle(target, i) * rows.row_stride", "to = block.shuffle(target, i) * rows.row_bytes"),
    fault("to = block.shuffle(target, i) * rows.row_stride", "to = block.shuffle(target, 0) * rows.row_stride"),
    fault("case 8: copy<std::uint64_t>", "case 8: copy<Bytes16>"),
    fault("words_a_step = kWarp % words;", "words_a_step = words > 1;"),
    fault("word = block.lane() % words;", "word = block.lane();"),
    fault("head * rows.head_stride + word", "head * rows.row_stride + word"),
    fault("          word -= words;\n          ++head;\n", "          word -= words;\n          head += 2;\n"),
    fault(f"if (at[i] >= 0) {HELD}", f"if (at[i] > 0) {HELD}"),
    # reordering
    fault("b < call.batch; b += kThreads) mine", "b + 1 < call.batch; b += kThreads) mine"),
    fault("if (shared.moved == 0) return;", "if (shared.moved <= 1) return;"),
    fault("const int width = kMostReorderBatch / call.batch;", "const int width = kMostReorderBatch / call.batch + 1;"),
    fault("tile[i] = row(rows, call.index[b], static_cast", "tile[i] = row(rows, b, static_cast"),
    fault(READ, READ.replace("!= b", "< b")),
    fault(TILE, TILE.partition("\n")[2], races=True),
    fault("if (word < words && call.index[b] != b) row(rows, b,", "if (word <= words && call.index[b] != b) row(rows, b,"),
    fault("call.rows[block.index().y];\n    switch", "call.rows[0];\n    switch"),
    fault("case 2: return move<std::uint16_t>", "case 2: return move<std::uint32_t>"),
    # the host's part
    fault("for first in range(0, len(rows), most):", "for first in range(0, len(rows), most + 1):", HOST),
    fault("batch, width, kept.stride(0))", "batch, width, kept.shape[1])", HOST),
    fault("if tensor.stride(3) != 1 and tensor.shape[3] != 1:", "if False:", HOST),
    fault("tensor.is_contiguous() and batch <=", "batch <=", HOST),
    fault("    index = index.contiguous()\n", "", HOST),
    fault("    n_kept, n_visual = vector(n_kept), vector(n_visual)\n", "", HOST),
)  # fmt: skip

FAMILY = Family("emulated", ("compact_", "reorder_"), 600, ("tests/ops/test_rows.py",), FAULTS, ("rows.cu",))
