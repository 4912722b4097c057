"""Attention in CUDA C++, emulated: through registers, and in stages through shared memory with tensor cores."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE, STAGED = "csrc/attention.h", "csrc/attention_staged.h"


def fault(old: str, new: str, file: str = FILE, races: bool = False) -> Fault:
    return Fault(file, old, new, races)


def staged(old: str, new: str, races: bool = False) -> Fault:
    return Fault(STAGED, old, new, races)


HEADS = "    block.sync();\n    DYRATE_UNROLL_BY(1)\n    for (int g = block.warp(); g < heads_here"

FAULTS = (
    # which rows and heads
    fault("kv_head = unit / chunks;", "kv_head = unit % chunks;"),
    fault("head_of_sequence = kv_head * group + chunk * unit_heads;", "head_of_sequence = kv_head * group;"),
    fault("n_read = call.kept ? call.n_kept[b] : call.n_visual[b];", "n_read = call.n_visual[b];"),
    fault("if (value) value += b * call.value_stride[0]", "if (value) value += b * call.key_stride[0]"),
    fault("new_row = call.visual_capacity + n_text - 1;", "new_row = call.visual_capacity + n_text;"),
    fault("if (chunk == 0 && split == splits - 1) append", "if (chunk == 1 && split == splits - 1) append"),
    fault("if (place >= total) return -1;", "if (place > total) return -1;"),
    fault("row = kept ? kept[place] : place;", "row = place;"),
    fault("position[row] >= call.window)", "position[row] > call.window)"),
    fault("call.position ? call.position + b * call.position_stride", "call.position ? call.position"),
    # through registers
    fault("? -kInfinity : logit[r][g] == -kInfinity ? -FLT_MAX : logit[r][g];", "? -kInfinity : logit[r][g];"),
    fault("for (int i = 0; i < kWide; ++i) sum[g][p][i] *= factor;", "for (int i = 0; i < kWide; ++i) sum[g][p][i] *= 1.f;"),
    fault("t * kTile + r * kTeams + team < work.n_read ? weight", "t * kTile + r * kTeams + team <= work.n_read ? weight"),
    # teams and splits become one
    fault("for (int other = 0; other < kTeams; ++other) high", "for (int other = 1; other < kTeams; ++other) high"),
    fault("norm += shared.stat[team][g][1] * shared.factor[team][g];", "norm += shared.stat[team][g][1];"),
    fault("sum += teams.sum[team][g][d] * shared.factor[team][g];", "sum += teams.sum[team][g][d];"),
    fault("(high == -kInfinity ? 0.f : high));\n      if (team == 0)", "high);\n      if (team == 0)"),
    fault("norm += parts.stat[g][s][1] * factor;", "norm += parts.stat[g][s][1];"),
    fault("high == -FLT_MAX ? NAN : norm == 0.f", "norm == 0.f"),
    fault("norm == 0.f ? 0.f : 1.f / norm;", "1.f / norm;"),
    fault("* parts.factor[g][s];", "* 1.f;"),
    fault("call.counters + work.b * block.grid().y + block.index().y", "call.counters + block.index().y"),
    fault(HEADS, HEADS.partition("\n")[2], races=True),
    # mass
    fault("if (block.lane() != 0) mass[kImage] = 0.f;", ""),
    fault("call.logits + head * call.logit_capacity + n_read;", "call.logits + head * call.logit_capacity;"),
    fault("call.text_type + b * call.text_type_stride", "call.text_type"),
    # one head in stages
    staged("for (int i = 0; i < kWide; ++i) sum[i] *= factor;", "for (int i = 0; i < kWide; ++i) sum[i] *= 1.f;"),
    staged("logit[r] = (live >> row & 1u) == 0 ? -kInfinity : logit[r]", "logit[r] = logit[r]"),
    staged("image += first_place + row < work.n_read ? weight : 0.f;", "image += weight;"),
    # several heads by tensor cores
    staged("moved = moved || factor[n][i] != 1.f;", "moved = false;"),
    staged("sum[n][s][i] *= factor[n][i % 2];", "sum[n][s][i] *= factor[n][i / 2];"),
    staged("first_place + row + 8 * below < work.n_read", "first_place + row < work.n_read"),
    staged("(logit[n][i] + other[n][i]) * scale", "logit[n][i] * scale"),
    staged("block.template load_matrices<true>", "block.template load_matrices<false>"),
    staged("norm[n][i] += block.shuffle_xor(norm[n][i], distance);", "norm[n][i] += 0.f;"),
    # the ring
    staged("      round ^= 1;\n", ""),
    staged("if (live != (1u << kRows) - 1) {", "if (live == 0) {"),
    staged("column < call.value_dim;", "column < call.dim;"),
    staged("(row < 0 || row == ring.new_row)) == 0", "row < 0) == 0"),
    staged("row == before + 1 && !fresh;", "row == before + 1;"),
    staged("(row / kRows % 2 ? call.value_dim : call.dim)", "call.value_dim"),
    staged("const int next = t + stages - 1;", "const int next = t + stages;"),
    staged("    block.sync();  // all warps are done with their rings\n", "", races=True),
)  # fmt: skip

FAMILY = Family(
    "emulated", ("decode_attention", "score_last_query", "decode_step"), 400,
    ("tests/ops/test_attention_staged.py", "tests/ops/test_attention.py"), FAULTS, ("attention_float16.cu",),
)  # fmt: skip
