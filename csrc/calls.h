// The arguments of each kernel as plain structs, and its launcher. Pointers are device addresses; strides count elements unless said.
//
// Lengths, counts, lists and rates live on the device and are read there, so that a captured graph stays valid when they change.
// Nothing here checks anything: `checks.h` does, before a struct reaches a launcher.
#pragma once

#include <cstdint>

#include "simt.h"

namespace dyrate {

/// Element types of tensors.
enum class Type : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

constexpr int kTypes = 4;  // token types: system, image, instruction, response
constexpr int kImage = 1;

/// Attention of one new token a sequence over `[visual | text]` rows, split over blocks, with statistics on request.
///
/// Grid `(max_splits, units, batch)`; a unit is up to so many query heads of one key/value head as the kernel takes: `group_block`, or
/// `unit` in the staged kernel.
struct AttentionCall {
  // ---- shape: the same in every step
  Type type;
  int batch, heads, kv_heads, dim, value_dim;
  int capacity, visual_capacity;  // rows of key and value; those of the visual region come first
  int list_width;                 // columns of kept; 0 without a list
  int logit_capacity;             // columns of logits: at least the rows that can be read
  int max_splits, min_rows;       // splits at most; rows that a split has at least
  int window;                     // rows are read where query_position - position < window; 0: all
  float scale;
  int write_logits;               // for mass (text rows) and importance
  int unit;                       // query heads of the staged kernel's unit: 1, 8, 16; 0: rows go through registers
  int stages;                     // tiles of its ring, 2 .. kMostStages
  int bulk;                       // 1: they are filled by bulk copies
  std::int64_t query_stride[3], key_stride[4], value_stride[4];  // the last one of each is 1
  std::int64_t new_key_stride[2], new_value_stride[2];
  std::int64_t kept_stride, text_type_stride, position_stride, query_position_stride;
  // ---- addresses
  const void* query;
  void* key;                      // written only where new_key is given
  void* value;                    // null in score_last_query
  void* output;                   // [B, Hq, value_dim] contiguous; null: no output
  const std::int32_t *n_visual, *n_text;
  const std::int32_t *kept, *n_kept;                 // null: all visual rows
  const std::uint8_t* text_type;                     // null: no mass
  const std::int32_t *position, *query_position;     // null without a window
  const void *new_key, *new_value;                   // null: nothing to append
  float* part;                    // scratch [B, Hq, max_splits, value_dim]
  float* part_stat;               // scratch [B, Hq, max_splits, 4]: maximum, sum, sum over image rows, unused
  float* head_stat;               // scratch [B, Hq, 2]: maximum in base 2, 1 / sum
  float* logits;                  // scratch [B, Hq, logit_capacity] in base 2, rows in reading order: visual, then text
  unsigned* counters;             // scratch [B, units], zero before and after
  float* mass;                    // [B, Hq, 4]; null: no mass
};

/// From logits to importance, and from mass and importance to the kept list. Grid `(blocks of columns, batch)`.
struct DecideCall {
  // ---- shape
  int batch, heads, visual_capacity, list_width, logit_capacity;
  int decide;                     // 0: importance alone
  int classes;                    // of the predictor; 0 without one
  Type weight_type, bias_type, score_type;
  std::int64_t weight_stride[2], bias_stride[2], score_stride[2], alive_stride[2];
  std::int64_t kept_in_stride;
  // ---- addresses
  const std::int32_t* n_visual;
  const std::int32_t *kept_in, *n_kept_in;           // the list that the attention read through; null: none
  const float *head_stat, *logits;
  const float* mass;
  float* importance;              // [B, visual_capacity]
  const void *weight, *bias;      // null without predictor
  const double* rates;
  const std::int32_t *count, *max_kept;              // null: not given
  const void* score;              // null: importance ranks
  const std::uint8_t* alive;      // null: all
  std::int32_t* kept;             // [B, visual_capacity]
  std::int32_t* n_kept;           // [B]
  double* rate;                   // [B]
  unsigned* counters;             // scratch [B], zero before and after
};

/// The count[b] highest scores, ascending by index. Grid `(batch)`.
struct SelectCall {
  int batch, tokens;
  Type score_type;
  std::int64_t score_stride[2], alive_stride[2];
  const void* score;
  const std::uint8_t* alive;      // null: all
  const std::int32_t *count, *n_visual;
  std::int32_t* kept;             // [B, tokens]
  std::int32_t* n_kept;           // [B]
};

/// The predictor alone. Grid `(batch)`.
struct PredictCall {
  int batch, features, classes;
  Type mass_type, weight_type, bias_type;
  std::int64_t weight_stride[2], bias_stride[2];
  const void *mass, *weight, *bias;  // mass [B, features] contiguous
  const double* rates;
  double* rate;                   // [B]
  std::int64_t* index;            // [B]
};

/// One tensor whose rows move, in bytes.
struct Rows {
  std::uint64_t address;
  std::int64_t sequence_stride, head_stride, row_stride;
  std::int64_t heads, row_bytes;
};

constexpr int kMostTensors = 80;  // a launch; their table travels by value and must fit the 4 KiB of kernel arguments

/// Hole filling. Grid `(movers, tensors, batch)`.
struct CompactCall {
  int batch, tensors, word;       // word: bytes that all addresses, strides and rows are multiples of, 1 .. 16
  std::int64_t kept_stride;
  const std::int32_t *kept, *n_kept, *n_visual;
  Rows rows[kMostTensors];
};

/// Sequence i becomes the former sequence index[i]. Grid `(blocks of words, tensors)`. Rows of one head and one row a sequence.
struct ReorderCall {
  int batch, tensors, word;
  const std::int64_t* index;
  Rows rows[kMostTensors];
};

// How the kernels cut the work, for those who shape launches (checks.h) and tests.
constexpr int kAttentionThreads = 128;
constexpr int kMostDim = 256;
constexpr int kUsualDim = 128;       // wider heads share one attention kernel, that for units of 8
constexpr int kDecideThreads = 256;
constexpr int kColumns = 64;         // importance columns of a decide block
constexpr int kMostReorderBatch = 2048;

/// Query heads of a unit: `group` heads a key/value head are cut into units of this many, the last one maybe of fewer.
DYRATE_HD constexpr int group_block(int group) { return group <= 1 ? 1 : group <= 4 ? 4 : 8; }

/// Blocks that a multiprocessor holds of the attention kernel for units of `group_heads` query heads: bounds its registers, shapes its grid.
DYRATE_HD constexpr int resident_blocks(int group_heads) { return group_heads == 8 ? 2 : 3; }

// The staged kernel (attention_staged.h), for 16-bit heads of up to kUsualDim elements.
constexpr int kMostStages = 4;
constexpr int kBulkUnit = 8;  // units of more heads take no bulk copies: a kernel less to compile for each size of head

/// Rows of a warp's tile: 16 of the tensor cores; for one query head as many as make 2 KiB of keys.
DYRATE_HD constexpr int staged_rows(int unit, int dim) { return unit > 1 ? 16 : 1024 / dim; }
/// Elements from a row of a tile to the next one.
DYRATE_HD constexpr int staged_pitch(int unit, int dim) { return unit > 1 ? dim + 8 : dim; }
/// Bytes of one stage of all warps: keys and values.
DYRATE_HD constexpr int staged_bytes(int unit, int dim) {
  return kAttentionThreads / kWarp * staged_rows(unit, dim) * staged_pitch(unit, dim) * 2 * 2;
}
/// Blocks that a multiprocessor holds as far as registers go.
DYRATE_HD constexpr int staged_blocks(int unit) { return unit == 1 ? 4 : unit == 8 ? 3 : 2; }
/// Bytes of shared memory that a block takes beside its ring, at most.
DYRATE_HD constexpr int staged_rest(int unit) { return unit == 1 ? 512 : 1536; }

#ifdef DYRATE_EMULATE
using Status = int;
using Stream = void*;
#else
using Status = cudaError_t;
using Stream = cudaStream_t;
#endif

// Launchers: the caller's stream, no allocation, no synchronisation.
Status decode_attention(const AttentionCall& call, Stream stream);  // decides nothing; importance needs `decide` after it
Status decide(const DecideCall& call, Stream stream);
Status select_tokens(const SelectCall& call, Stream stream);
Status predict_rate(const PredictCall& call, Stream stream);
Status compact(const CompactCall& call, int movers, Stream stream);
Status reorder(const ReorderCall& call, int blocks, Stream stream);

}  // namespace dyrate
