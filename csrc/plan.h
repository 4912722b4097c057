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

/// The GPU. capability: ten times its compute capability's major number and the minor one; code: the same of the architecture whose code runs.
struct Gpu {
  int multiprocessors, capability, code;
};

/// What a device file or a test asks for (dyrate_kernels/ops/cuda.py).
struct AttentionSettings {
  int tensor_cores;  // the least group of query heads that takes them; 0: none does
  int stages;        // 0: as planned; 1: rows go through registers
  int bulk;          // 1: bulk copies, where the GPU has them
};

/// KiB of shared memory of a multiprocessor; what is not known has as much as the smallest.
inline int shared_kib(int capability) {
  switch (capability) {
    case 80: case 87: return 164;
    case 90: case 100: case 101: case 103: case 110: return 228;
    default: return capability < 80 ? 64 : 100;
  }
}

/// Heads of up to kUsualDim elements are rounded up to one of two sizes.
inline int staged_dim(const AttentionCall& call) { return std::max(call.dim, call.value_dim) <= 64 ? 64 : kUsualDim; }

/// Bytes of shared memory that the staged kernel's launch asks for.
inline int staged_ring(const AttentionCall& call) { return call.stages * staged_bytes(call.unit, staged_dim(call)); }

/// Blocks of the staged kernel that a multiprocessor holds; each costs 1 KiB beside its own shared memory. One block may have all but that.
inline int staged_blocks(const AttentionCall& call, int capability) {
  return std::min(staged_blocks(call.unit), shared_kib(capability) * 1024 / (staged_ring(call) + staged_rest(call.unit) + 1024));
}

/// Fills in unit, stages and bulk. As many stages as leave room for as many blocks as two do.
inline void plan_kernel(AttentionCall& call, const Gpu& gpu, const AttentionSettings& settings) {
  const int group = call.heads / call.kv_heads;
  const bool half = call.type == Type::kFloat16 || call.type == Type::kBFloat16;
  call.unit = call.stages = call.bulk = 0;
  if (!half || gpu.code < 80 || std::max(call.dim, call.value_dim) > kUsualDim || settings.stages == 1) return;
  if (std::max(call.key_stride[2], call.value_stride[2]) > INT32_MAX) return;  // the staged kernel multiplies by 32 bits
  const bool tensor_cores = settings.tensor_cores > 0 && group >= settings.tensor_cores;
  if (!tensor_cores && group > 1) return;
  call.unit = !tensor_cores ? 1 : group <= 8 ? 8 : 16;
  call.stages = 2;
  const int blocks = staged_blocks(call, gpu.capability);
  if (settings.stages) {
    call.stages = settings.stages;
  } else {
    for (int stages = kMostStages; stages > 2; --stages) {
      call.stages = stages;
      if (staged_blocks(call, gpu.capability) == blocks) break;
      call.stages = 2;
    }
  }
  while (call.stages > 2 && staged_blocks(call, gpu.capability) == 0) --call.stages;  // more than a block may have
  call.bulk = settings.bulk && gpu.code >= 90 && call.unit <= kBulkUnit;
}

/// Blocks of the grid's second axis, at most: rows that are not aligned, which addresses decide, take units of `group_block` heads.
inline int attention_units(const AttentionCall& call) {
  const int group = call.heads / call.kv_heads;
  return static_cast<int>(call.kv_heads * ceil_div(group, group_block(group)));
}

/// Blocks that a multiprocessor holds of the call's kernel; a grid of more would run in two waves, the second one short.
/// (Rows that are not aligned take the kernel for units of 8 through registers.)
inline int attention_blocks(const AttentionCall& call, int capability) {
  if (call.unit) return staged_blocks(call, capability);
  return resident_blocks(std::max(call.dim, call.value_dim) > kUsualDim ? 8 : group_block(call.heads / call.kv_heads));
}

/// Fills in unit, stages, bulk, max_splits, min_rows and logit_capacity.
inline void plan_attention(AttentionCall& call, const Gpu& gpu, const AttentionSettings& settings) {
  plan_kernel(call, gpu, settings);
  const std::int64_t rows = readable_rows(call);
  const std::int64_t units = call.unit ? call.kv_heads * ceil_div(call.heads / call.kv_heads, call.unit) : attention_units(call);
  const std::int64_t blocks = std::max<std::int64_t>(call.batch * units, 1);
  const std::int64_t wanted = std::max<std::int64_t>(static_cast<std::int64_t>(attention_blocks(call, gpu.capability)) * gpu.multiprocessors / blocks, 1);
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
