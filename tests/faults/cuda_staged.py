"""Attention of 16-bit rows in CUDA C++, emulated: more faults of its tiles in shared memory than in ``cuda_attention.py``."""

from __future__ import annotations

from tests.faults.fault import Family, Fault

FILE = "csrc/attention_staged.h"


def fault(old: str, new: str, races: bool = False) -> Fault:
    return Fault(FILE, old, new, races)


MEET = "    const std::uint32_t live = block.ballot(row >= 0);\n    block.sync_warp();\n"
ZEROS = "          block.fence_proxy();\n          block.sync_warp();\n"
SUMS = "    heads.end(block, shared.common, teams);\n    block.sync();\n"
PACKED = "block.template pack<Element>(logit[n][2 * below], logit[n][2 * below + 1])"
VALUE_ROW = "((lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8)"
NEW_VALUE = "fresh ? ring.new_value : ring.value + at * ring.value_step, ring.has_value"
HIGH, NORM = (
    "for (int distance = 4; distance < kWarp; distance *= 2) high",
    "distance = 4; distance < kWarp; distance *= 2) {\n          norm",
)

FAULTS = (
    # copies and waits
    fault("      if (!kBulk) block.wait_copies(stages - 2);\n", ""),
    fault("block.wait_copies(stages - 2)", "block.wait_copies(stages > 3 ? 2 : stages - 1)"),
    fault("      out.advance(stages);\n", ""),
    fault("row = locate(next + 1);", "row = locate(next);"),
    fault("block.extra() + warp * stages * kStageBytes", "block.extra() + warp * (stages - 1) * kStageBytes"),
    fault("      block.clear16_at(ring.begin + row * kPitch * kSize + column * 16);\n", ""),
    fault(NEW_VALUE, NEW_VALUE.removeprefix("fresh ? ring.new_value : ")),
    fault(MEET, MEET.partition("\n")[0] + "\n", races=True),
    # bulk copies
    fault("count_bits(live) * (key_bytes + value_bytes)", "count_bits(live) * key_bytes"),
    fault("            block.clear16_at(values + at);\n", ""),
    fault("lowest_bit(starts) + 1 : kWarp", "lowest_bit(starts) + 2 : kWarp"),
    fault(" && (!value_bytes || fills(value_bytes, ring.value_step));", ";"),
    fault("row == before + 1 && !fresh", "row > before && !fresh"),
    fault(ZEROS, ZEROS.partition("\n")[2], races=True),
    # tensor cores
    fault(VALUE_ROW, "((lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * 8)"),
    fault("(lane % 16 * kPitch + lane / 16 * 8)", "((lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8)"),
    fault(f"block.transpose_matrix({PACKED})", PACKED),
    fault("const int head = 8 * n + block.lane() / 4;", "const int head = 8 * n + block.lane() % 8;"),
    fault("(live >> its & 1u) == 0 ? -kInfinity", "its > kRows ? -kInfinity"),
    fault(HIGH, HIGH.replace("= 4", "= 8")),
    fault(NORM, NORM.replace("= 4", "= 8")),
    fault("if (block.ballot(moved))", "if (block.ballot(false))"),
    fault("[first_place + i / 2 * 8] = logit", "[first_place + i % 2 * 8] = logit"),
    fault("2 * (block.lane() % 4) + i < work.heads_here;", "2 * (block.lane() % 4) + i < kGroup;"),
    fault("first_place + row + 8 * below < work.n_read", "first_place + row + 8 * below <= work.n_read"),
    # one head
    fault("(live >> row & 1u) == 0 ? -kInfinity", "row > kRows ? -kInfinity"),
    fault("first_place + row < work.n_read", "first_place + row <= work.n_read"),
    fault(SUMS, SUMS.partition("\n")[0] + "\n", races=True),
)  # fmt: skip

FAMILY = Family(
    "emulated", ("decode_attention", "decode_step", "score_last_query"), 400, ("tests/ops/test_attention_staged.py",), FAULTS,
    ("attention_float16.cu",),
)  # fmt: skip
