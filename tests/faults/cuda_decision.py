"""Importance, predictor, count and selection in CUDA C++, emulated."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, NUMBERS, HOST = "csrc/decision.h", "csrc/numbers.h", "dyrate_kernels/ops/cuda.py"


def fault(old: str, new: str, file: str = FILE, races: bool = False) -> Fault:
    return Fault(file, old, new, races)


SUMMED = "= all / call.heads;\n      }\n      block.sync();\n"

FAULTS = (
    # the order of numbers
    fault("0x7F800000u) return 1;\n  if (magnitude == 0)", "0x7F800000u) return 1;\n  if (magnitude == 1)", NUMBERS),
    fault("if (magnitude > 0x7F800000u) return 1;", "if (magnitude >= 0x7F800000u) return 1;", NUMBERS),
    fault("if (magnitude > 0x7FF0000000000000u) return 1;", "", NUMBERS),
    fault("return bits >> 63 ? ~bits : bits | 0x8000000000000000u", "return bits >> 63 ? bits : bits | 0x8000000000000000u", NUMBERS),
    # candidates
    fault("!alive[token * alive_stride]", "!alive[token]"),
    fault("const std::int64_t at = token * stride;", "const std::int64_t at = token;"),
    fault("mine += key != 0;", "mine += 1;"),
    fault("const bool cached = scores.n <= kCached;", "const bool cached = scores.n <= 2 * kCached;"),
    fault("  if (n_kept < 0) n_kept = 0;\n", ""),
    fault("int place = n_kept + thread; place < width", "int place = n_kept + 1 + thread; place < width"),
    fault("int place = n_kept + thread; place < width", "int place = n_kept + thread; place <= width"),
    # sums of the block
    fault("if (block.lane() >= distance) sum += below;", "if (block.lane() > distance) sum += below;"),
    fault("  block.sync();  // the totals of an earlier call have been read\n", "", races=True),
    fault("if (warp == block.warp()) sum += all;", "if (warp == block.warp() && warp > 1) sum += all;"),
    # the search
    fault("|| (key >> (shift + 7) >> 1) == (threshold >> (shift + 7) >> 1)", "|| true"),
    fault("if (at_least >= needed && at_least - own < needed) {", "if (at_least > needed && at_least - own < needed) {"),
    fault("shared.needed = needed - (at_least - own);", "shared.needed = needed;"),
    fault("shared.digit = kBins - 1 - thread;", "shared.digit = kBins - 2 - thread;"),
    # the list
    fault("const int ties_before = ties + (before & 0xFFFF);", "const int ties_before = before & 0xFFFF;"),
    fault("    above += total >> 16;\n", ""),
    fault("(tie && ties_before < needed)) kept", "(tie && ties_before <= needed)) kept"),
    fault("(ties_before < needed ? ties_before : needed)", "ties_before"),
    # predictor
    fault("r * weight_stride[0] + f * weight_stride[1]", "r * weight_stride[0] + f"),
    fault("f < features; f += kWarp)", "f < features; f += 2 * kWarp)"),
    fault("    if (key > best) {\n", "    if (key >= best) {\n"),
    fault("highest && shared.index[warp] < shared.best", "highest && shared.index[warp] > shared.best"),
    fault("bias_start + r * bias_stride", "r * bias_stride"),
    # count and rate
    fault("n * (1.0 - rate) + 1e-6", "n * (1.0 - rate)"),
    fault("if (!(kept < n)) return n;", "if (kept >= n) return n;"),
    fault("call.max_kept[b] < count", "call.max_kept[0] < count"),
    fault("n > 0 ? 1.0 - static_cast<double>(n_kept) / n : 0.0", "1.0 - static_cast<double>(n_kept) / n"),
    # importance
    fault(SUMMED, SUMMED.rpartition("      block.sync();")[0], races=True),
    fault("for (int column = block.thread(); column < call.visual_capacity; column += kThreads) row[column] = 0.f;", ""),
    fault("last = (part + 1) * call.heads / kParts;", "last = first + call.heads / kParts;"),
    fault("sum += logit == -INFINITY ? 0.f : probability;", "sum += probability;"),
    fault("row[list ? list[column] : column]", "row[column]"),
    fault("      if (column < n_read) {\n", "      if (column <= n_read) {\n"),
    fault("= all / call.heads;", "= all / kParts;"),
    fault("scores.score = offset(call.score, b * call.score_stride[0], call.score_type)", "scores.score = call.score"),
    fault("block.last_of(call.counters + b, block.grid().x", "block.last_of(call.counters, block.grid().x"),
    fault("block.last_of(call.counters + b, block.grid().x, &shared.flag)", "block.index().x + 1 == block.grid().x"),
    # the host's part
    fault("score, alive, vector(count), vector(n_visual)", "score, alive, count, vector(n_visual)", HOST),
)  # fmt: skip

OPERATORS = (*["select_tokens"] * 3, *["predict_rate"] * 2, "decode_step", "decode_attention", "score_last_query")

FAMILY = Family(
    "emulated", OPERATORS, 400,
    ("tests/ops/test_decision.py",), FAULTS, ("decision.cu",),
)  # fmt: skip
