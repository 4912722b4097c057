// Shapes launches: from capacities and the number of multiprocessors, never from live lengths, so that a captured graph stays valid.
// Pure host code, tested on its own (tests/emulated/host_parts.cpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include "calls.h"

namespace dyrate {

constexpr int kLeastRows = 64;   // of a split: below, the combination costs more than it saves
constexpr int kSplitLimit = 64;  // as the kernel's shared memory has places for

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Rows of a sequence that an attention call can read.
inline std::int64_t readable_rows(const AttentionCall& call) {
  return (call.list_width > 0 ? call.list_width : call.visual_capacity) + static_cast<std::int64_t>(call.capacity) - call.visual_capacity;
}

/// Blocks of the grid's second axis: units of query heads.
inline int attention_units(const AttentionCall& call) {
  const int group = call.heads / call.kv_heads;
  return static_cast<int>(call.kv_heads * ceil_div(group, group_block(group)));
}

/// Blocks that a multiprocessor holds of the call's kernel; a grid of more would run in two waves, the second one short.
/// (Rows that are not aligned, which addresses decide, take the kernel for units of 8 too.)
inline int attention_blocks(const AttentionCall& call) {
  return resident_blocks(std::max(call.dim, call.value_dim) > kUsualDim ? 8 : group_block(call.heads / call.kv_heads));
}

/// Fills in max_splits, min_rows and logit_capacity.
inline void plan_attention(AttentionCall& call, int multiprocessors) {
  const std::int64_t rows = readable_rows(call);
  const std::int64_t blocks = std::max<std::int64_t>(static_cast<std::int64_t>(call.batch) * attention_units(call), 1);
  const std::int64_t wanted = std::max<std::int64_t>(static_cast<std::int64_t>(attention_blocks(call)) * multiprocessors / blocks, 1);
  call.min_rows = kLeastRows;
  call.max_splits = static_cast<int>(std::clamp<std::int64_t>(std::min(wanted, ceil_div(rows, kLeastRows)), 1, kSplitLimit));
  call.logit_capacity = static_cast<int>(ceil_div(std::max<std::int64_t>(rows, 1), 16) * 16);
}

/// Elements of each scratch buffer of an attention call.
struct AttentionScratch {
  std::int64_t part, part_stat, head_stat, logits, counters;
};
inline AttentionScratch attention_scratch(const AttentionCall& call) {
  const std::int64_t heads = static_cast<std::int64_t>(call.batch) * call.heads;
  return {heads * call.max_splits * call.value_dim, heads * call.max_splits * 4, heads * 2,
          call.write_logits ? heads * call.logit_capacity : 0, static_cast<std::int64_t>(call.batch) * attention_units(call)};
}

/// Blocks that share the moves of one sequence and tensor.
inline int compact_movers(int batch, int tensors, std::int64_t most_moves) {
  const std::int64_t useful = std::max<std::int64_t>(ceil_div(most_moves, 64), 1);
  const std::int64_t wanted = std::max<std::int64_t>(8192 / std::max<std::int64_t>(static_cast<std::int64_t>(batch) * tensors, 1), 1);
  return static_cast<int>(std::min(useful, wanted));
}

/// Blocks that share the words of one tensor's sequences.
inline int reorder_blocks(int batch, std::int64_t most_words) {
  return static_cast<int>(std::clamp<std::int64_t>(ceil_div(most_words, std::max(kMostReorderBatch / std::max(batch, 1), 1)), 1, 1024));
}

}  // namespace dyrate
