// Split-K flash decoding over two row regions, with the statistics of the step.
//
// For query head h of sequence b over its live rows r, with z_r = scale * q_h . k_r:
//     output = sum_r softmax(z)_r v_r          mass[t] = sum over rows of type t of softmax(z)_r
//
// Two kernels. In this file: a row is shared by a team of lanes, 16 bytes a lane and load; a team has a softmax of its own, so the main
// loop meets no barrier. While a tile is computed, the loads of the next one are in flight in registers and the row numbers of the one after
// it are being read. It takes any type, size and alignment and runs on sm_75. In attention_staged.h: tiles of several stages in shared
// memory, tensor cores for several query heads.
//
// Both: teams are combined through shared memory, splits by the last block of a unit to finish. Rows are numbered in reading order ("place"):
// visual rows, or the kept list, then text rows; how they are cut into splits is computed here from the live lengths.
//
// Logits are in base 2. A live row whose logit is -inf gets the lowest finite number instead, which tells it from a dead row: softmax
// over nothing but such rows is NaN, over no row at all it is 0.
#pragma once

#include <cfloat>

#include "numbers.h"

namespace dyrate {

constexpr float kInfinity = static_cast<float>(INFINITY);
constexpr float kLog2E = 1.4426950408889634f;
constexpr int kMostSplits = 64;

/// What a block is at work on.
template <class Element>
struct Work {
  int split, splits;
  int chunk, kv_head;       // of the unit: its part of the heads of a key/value head
  int heads_here;           // query heads of the unit
  int head_of_sequence;     // the first of them
  std::int64_t b, first_head;  // the sequence; the first head, of all sequences' heads
  int n_read, n_text, total;   // places of visual rows; of text rows; all
  int new_row;              // the row that new_key holds; -2: none
  int query_position;
  const Element *key, *value, *new_key, *new_value;
  const std::int32_t* kept;
  const std::int32_t* position;

  /// False where the block has nothing to do. Writes the new row, which nobody reads from there in this launch but from where it came.
  template <class Block>
  DYRATE_HD bool open(Block& block, const AttentionCall& call, int unit_heads, int threads) {
    split = static_cast<int>(block.index().x);
    const int unit = static_cast<int>(block.index().y);
    b = block.index().z;
    const int group = call.heads / call.kv_heads;
    const int chunks = (group + unit_heads - 1) / unit_heads;
    kv_head = unit / chunks;
    chunk = unit % chunks;
    heads_here = group - chunk * unit_heads < unit_heads ? group - chunk * unit_heads : unit_heads;
    head_of_sequence = kv_head * group + chunk * unit_heads;
    first_head = b * call.heads + head_of_sequence;
    n_text = call.n_text[b];
    n_read = call.kept ? call.n_kept[b] : call.n_visual[b];
    total = n_read + n_text;
    const int most = (total + call.min_rows - 1) / call.min_rows;
    splits = most < 1 ? 1 : most < call.max_splits ? most : call.max_splits;
    if (split >= splits) return false;

    key = static_cast<const Element*>(call.key) + b * call.key_stride[0] + kv_head * call.key_stride[1];
    value = static_cast<const Element*>(call.value);
    if (value) value += b * call.value_stride[0] + kv_head * call.value_stride[1];
    new_row = -2;
    new_key = new_value = nullptr;
    if (call.new_key && n_text > 0) {
      new_row = call.visual_capacity + n_text - 1;
      new_key = static_cast<const Element*>(call.new_key) + b * call.new_key_stride[0] + kv_head * call.new_key_stride[1];
      new_value = static_cast<const Element*>(call.new_value) + b * call.new_value_stride[0] + kv_head * call.new_value_stride[1];
      if (chunk == 0 && split == splits - 1) append(block, call, threads);
    }
    kept = call.kept ? call.kept + b * call.kept_stride : nullptr;
    position = call.position ? call.position + b * call.position_stride : nullptr;
    query_position = call.window ? call.query_position[b * call.query_position_stride] : 0;
    return true;
  }

  /// The row at a place, -1 where there is none to read.
  DYRATE_HD int locate(const AttentionCall& call, int place) const {
    if (place >= total) return -1;
    int row = call.visual_capacity + place - n_read;
    if (place < n_read) row = kept ? kept[place] : place;
    if (call.window && query_position - position[row] >= call.window) return -1;
    return row;
  }

 private:
  template <class Block>
  DYRATE_HD void append(Block& block, const AttentionCall& call, int threads) const {
    Element* keys = static_cast<Element*>(call.key) + b * call.key_stride[0] + kv_head * call.key_stride[1];
    Element* values = static_cast<Element*>(call.value) + b * call.value_stride[0] + kv_head * call.value_stride[1];
    for (int d = block.thread(); d < call.dim; d += threads) keys[new_row * call.key_stride[2] + d] = new_key[d];
    for (int d = block.thread(); d < call.value_dim; d += threads) values[new_row * call.value_stride[2] + d] = new_value[d];
  }
};

/// What teams bring together, and splits. Loops run once or twice a launch: they are not unrolled, which would be most of the code.
template <class Element, int kDim, int kGroup, int kTeams, int kThreads>
struct Combination {
  struct Shared {
    float stat[kTeams][kGroup][3];  // maximum, sum, sum over image rows
    float factor[kTeams][kGroup];
    float total[kGroup][2];  // maximum, 1 / sum
    int flag;
  };
  struct Teams {
    float sum[kTeams][kGroup][kDim];
  };
  struct Splits {
    float stat[kGroup][kMostSplits][3];
    float factor[kGroup][kMostSplits];
  };

  /// From the teams' softmax to results. `teams` and `splits` may be the same memory.
  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const Teams& teams, Splits& splits, const AttentionCall& call, const Work<Element>& work) {
    combine_teams(block, shared, teams, call, work);
    unsigned* counter = call.counters + work.b * block.grid().y + block.index().y;
    if (!block.last_of(counter, static_cast<unsigned>(work.splits), &shared.flag)) return;
    combine_splits(block, shared, splits, call, work);
  }

 private:
  /// The teams of this block become one part in scratch memory.
  template <class Block>
  static DYRATE_HD void combine_teams(Block& block, Shared& shared, const Teams& teams, const AttentionCall& call, const Work<Element>& work) {
    const int heads_here = work.heads_here, split = work.split;
    const std::int64_t first_head = work.first_head;
    DYRATE_UNROLL_BY(1)
    for (int i = block.thread(); i < heads_here * kTeams; i += kThreads) {
      const int g = i / kTeams, team = i % kTeams;
      float high = -kInfinity;
      for (int other = 0; other < kTeams; ++other) high = fmaxf(high, shared.stat[other][g][0]);
      shared.factor[team][g] = exp2f(shared.stat[team][g][0] - (high == -kInfinity ? 0.f : high));
      if (team == 0) shared.total[g][0] = high;
    }
    block.sync();
    DYRATE_UNROLL_BY(1)
    for (int g = block.thread(); g < heads_here; g += kThreads) {
      float norm = 0.f, image = 0.f;
      for (int team = 0; team < kTeams; ++team) {
        norm += shared.stat[team][g][1] * shared.factor[team][g];
        image += shared.stat[team][g][2] * shared.factor[team][g];
      }
      float* stat = call.part_stat + ((first_head + g) * call.max_splits + split) * 4;
      stat[0] = shared.total[g][0];
      stat[1] = norm;
      stat[2] = image;
    }
    if (call.output == nullptr) return;
    DYRATE_UNROLL_BY(1)
    for (int i = block.thread(); i < heads_here * call.value_dim; i += kThreads) {
      const int g = i / call.value_dim, d = i % call.value_dim;
      float sum = 0.f;
      for (int team = 0; team < kTeams; ++team) sum += teams.sum[team][g][d] * shared.factor[team][g];
      call.part[((first_head + g) * call.max_splits + split) * call.value_dim + d] = sum;
    }
  }

  /// The last block of a unit: output, mass, and what turns logits into probabilities.
  template <class Block>
  static DYRATE_HD void combine_splits(Block& block, Shared& shared, Splits& parts, const AttentionCall& call, const Work<Element>& work) {
    const int heads_here = work.heads_here, splits = work.splits, n_read = work.n_read, n_text = work.n_text;
    const std::int64_t first_head = work.first_head, b = work.b;
    DYRATE_UNROLL_BY(1)
    for (int i = block.thread(); i < heads_here * splits; i += kThreads) {
      const int g = i / splits, s = i % splits;
      const float* stat = call.part_stat + ((first_head + g) * call.max_splits + s) * 4;
      for (int f = 0; f < 3; ++f) parts.stat[g][s][f] = block.load_shared_by_blocks(stat + f);
    }
    block.sync();
    DYRATE_UNROLL_BY(1)
    for (int g = block.warp(); g < heads_here; g += kThreads / kWarp) {  // a warp for each head
      float high = -kInfinity, norm = 0.f, image = 0.f;
      for (int s = block.lane(); s < splits; s += kWarp) high = fmaxf(high, parts.stat[g][s][0]);
      for (int distance = kWarp / 2; distance > 0; distance /= 2) high = fmaxf(high, block.shuffle_xor(high, distance));
      const float finite = high == -kInfinity ? 0.f : high;
      for (int s = block.lane(); s < splits; s += kWarp) {
        const float factor = exp2f(parts.stat[g][s][0] - finite);
        parts.factor[g][s] = factor;
        norm += parts.stat[g][s][1] * factor;
        image += parts.stat[g][s][2] * factor;
      }
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        norm += block.shuffle_xor(norm, distance);
        image += block.shuffle_xor(image, distance);
      }
      const float share = high == -FLT_MAX ? NAN : norm == 0.f ? 0.f : 1.f / norm;
      const std::int64_t head = first_head + g;
      if (call.mass) {
        float mass[kTypes] = {0.f, image, 0.f, 0.f};
        if (block.lane() != 0) mass[kImage] = 0.f;
        const float* logits = call.logits + head * call.logit_capacity + n_read;
        const std::uint8_t* type = call.text_type + b * call.text_type_stride;
        for (int row = block.lane(); row < n_text; row += kWarp) {
          const float weight = exp2f(block.load_shared_by_blocks(logits + row) - finite);
          DYRATE_UNROLL
          for (int kind = 0; kind < kTypes; ++kind) mass[kind] += type[row] == kind ? weight : 0.f;
        }
        DYRATE_UNROLL
        for (int kind = 0; kind < kTypes; ++kind) {
          for (int distance = kWarp / 2; distance > 0; distance /= 2) mass[kind] += block.shuffle_xor(mass[kind], distance);
          if (block.lane() == 0) call.mass[head * kTypes + kind] = mass[kind] * share;
        }
      }
      if (block.lane() == 0) {
        shared.total[g][1] = share;
        if (call.head_stat) {
          call.head_stat[head * 2] = high;
          call.head_stat[head * 2 + 1] = share;
        }
      }
    }
    block.sync();
    if (call.output == nullptr) return;
    Element* output = static_cast<Element*>(call.output);
    DYRATE_UNROLL_BY(1)
    for (int i = block.thread(); i < heads_here * call.value_dim; i += kThreads) {
      const int g = i / call.value_dim, d = i % call.value_dim;
      const float* part = call.part + (first_head + g) * call.max_splits * static_cast<std::int64_t>(call.value_dim) + d;
      float sum = 0.f;
      DYRATE_UNROLL_BY(8)
      for (int s = 0; s < splits; ++s) {
        sum += block.load_shared_by_blocks(part + static_cast<std::int64_t>(s) * call.value_dim) * parts.factor[g][s];
      }
      from_float(sum * shared.total[g][1], output + (first_head + g) * call.value_dim + d);
    }
  }
};

/// kDim: dim and value_dim rounded up. kAligned: every row of query, key, value and new row starts at a multiple of 16 bytes and has
/// a whole number of 16-byte groups.
template <class Element, int kDim, int kGroup, bool kAligned>
struct AttentionKernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = resident_blocks(kGroup);
  static constexpr int kWide = kPerGroup<Element>;
  static constexpr int kLanes = kDim / kWide < kWarp ? kDim / kWide : kWarp;  // of a team
  static constexpr int kPieces = kDim / kWide / kLanes;                       // 16-byte groups of a row that a lane holds
  static constexpr int kTeams = kThreads / kLanes;
  static constexpr int kStep = (kGroup == 1 ? 4 : 2) / kPieces;  // rows of a tile that a team holds
  static constexpr int kTile = kTeams * kStep;

  using Together = Combination<Element, kDim, kGroup, kTeams, kThreads>;
  struct Shared {
    typename Together::Shared common;
    typename Together::Teams teams;
    typename Together::Splits splits;
  };

  /// One team's tile: 16-byte groups of its rows.
  struct Tile {
    Bytes16 key[kStep][kPieces];
    Bytes16 value[kStep][kPieces];
  };

  template <class Block>
  static DYRATE_HD Bytes16 load_group(Block& block, const Element* row, int column, int columns) {
    if constexpr (kAligned) return block.load16(row + column);
    return gather16(row + column, columns - column);
  }

  template <class Block>
  static DYRATE_HD void fetch(Block& block, const AttentionCall& call, const Work<Element>& work, const int (&row)[kStep], Tile& tile) {
    const int lane = block.thread() % kLanes;
    DYRATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      const bool fresh = row[r] == work.new_row;
      const std::int64_t at = row[r] > 0 ? row[r] : 0;
      const Element* key = fresh ? work.new_key : work.key + at * call.key_stride[2];
      const Element* value = fresh ? work.new_value : work.value;
      if (!fresh && value) value += at * call.value_stride[2];
      DYRATE_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        const int column = (p * kLanes + lane) * kWide;
        tile.key[r][p] = tile.value[r][p] = Bytes16{{0, 0, 0, 0}};
        if (row[r] >= 0 && column < call.dim) tile.key[r][p] = load_group(block, key, column, call.dim);
        if (row[r] >= 0 && work.value && column < call.value_dim) tile.value[r][p] = load_group(block, value, column, call.value_dim);
      }
    }
  }

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const AttentionCall& call) {
    Work<Element> work;
    if (!work.open(block, call, kGroup, kThreads)) return;
    attend(block, shared, call, work);
    Together::run(block, shared.common, shared.teams, shared.splits, call, work);
  }

  /// The main loop: this split's rows through each team's softmax, into shared.teams and shared.common.
  template <class Block>
  static DYRATE_HD void attend(Block& block, Shared& shared, const AttentionCall& call, const Work<Element>& work) {
    const int heads_here = work.heads_here;
    const int lane = block.thread() % kLanes, team = block.thread() / kLanes;
    float query[kGroup][kPieces][kWide], sum[kGroup][kPieces][kWide];
    float top[kGroup], norm[kGroup], image[kGroup];
    DYRATE_UNROLL
    for (int g = 0; g < kGroup; ++g) {
      top[g] = -kInfinity;
      norm[g] = image[g] = 0.f;
      const Element* row = static_cast<const Element*>(call.query) + work.b * call.query_stride[0] + (work.head_of_sequence + g) * call.query_stride[1];
      DYRATE_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        const int column = (p * kLanes + lane) * kWide;
        Bytes16 packed{{0, 0, 0, 0}};
        if (g < heads_here && column < call.dim) packed = load_group(block, row, column, call.dim);
        unpack(packed, query[g][p], static_cast<const Element*>(nullptr));
        DYRATE_UNROLL
        for (int i = 0; i < kWide; ++i) {
          query[g][p][i] *= call.scale * kLog2E;
          sum[g][p][i] = 0.f;
        }
      }
    }

    const int tiles = (work.total + kTile - 1) / kTile;
    const int first = static_cast<int>(static_cast<std::int64_t>(work.split) * tiles / work.splits);
    const int last = static_cast<int>(static_cast<std::int64_t>(work.split + 1) * tiles / work.splits);
    int row[kStep], next_row[kStep];
    Tile tile;
    DYRATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      row[r] = first < last ? work.locate(call, first * kTile + r * kTeams + team) : -1;
      next_row[r] = first + 1 < last ? work.locate(call, (first + 1) * kTile + r * kTeams + team) : -1;
    }
    fetch(block, call, work, row, tile);
    for (int t = first; t < last; ++t) {
      Tile next;
      fetch(block, call, work, next_row, next);
      int after[kStep];
      DYRATE_UNROLL
      for (int r = 0; r < kStep; ++r) after[r] = t + 2 < last ? work.locate(call, (t + 2) * kTile + r * kTeams + team) : -1;

      float logit[kStep][kGroup];
      DYRATE_UNROLL
      for (int r = 0; r < kStep; ++r) {
        DYRATE_UNROLL
        for (int g = 0; g < kGroup; ++g) logit[r][g] = 0.f;
        DYRATE_UNROLL
        for (int p = 0; p < kPieces; ++p) {
          float key[kWide];
          unpack(tile.key[r][p], key, static_cast<const Element*>(nullptr));
          DYRATE_UNROLL
          for (int g = 0; g < kGroup; ++g) {
            DYRATE_UNROLL
            for (int i = 0; i < kWide; ++i) logit[r][g] += query[g][p][i] * key[i];
          }
        }
      }
      DYRATE_UNROLL
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        DYRATE_UNROLL
        for (int r = 0; r < kStep; ++r) {
          DYRATE_UNROLL
          for (int g = 0; g < kGroup; ++g) logit[r][g] += block.shuffle_xor(logit[r][g], distance);
        }
      }

      DYRATE_UNROLL
      for (int g = 0; g < kGroup; ++g) {
        float high = top[g];
        DYRATE_UNROLL
        for (int r = 0; r < kStep; ++r) {
          const int place = t * kTile + r * kTeams + team;
          logit[r][g] = row[r] < 0 ? -kInfinity : logit[r][g] == -kInfinity ? -FLT_MAX : logit[r][g];
          high = fmaxf(high, logit[r][g]);
          if (call.write_logits && lane == g % kLanes && g < heads_here && place < work.total) {
            call.logits[(work.first_head + g) * call.logit_capacity + place] = logit[r][g];
          }
        }
        const float finite = high == -kInfinity ? 0.f : high;
        const float factor = exp2f(top[g] - finite);
        top[g] = high;
        norm[g] *= factor;
        image[g] *= factor;
        DYRATE_UNROLL
        for (int p = 0; p < kPieces; ++p) {
          DYRATE_UNROLL
          for (int i = 0; i < kWide; ++i) sum[g][p][i] *= factor;
        }
        DYRATE_UNROLL
        for (int r = 0; r < kStep; ++r) {
          const float weight = exp2f(logit[r][g] - finite);
          logit[r][g] = weight;
          norm[g] += weight;
          image[g] += t * kTile + r * kTeams + team < work.n_read ? weight : 0.f;
        }
      }
      if (work.value) {
        DYRATE_UNROLL
        for (int r = 0; r < kStep; ++r) {
          DYRATE_UNROLL
          for (int p = 0; p < kPieces; ++p) {
            float value[kWide];
            unpack(tile.value[r][p], value, static_cast<const Element*>(nullptr));
            DYRATE_UNROLL
            for (int g = 0; g < kGroup; ++g) {
              DYRATE_UNROLL
              for (int i = 0; i < kWide; ++i) sum[g][p][i] += logit[r][g] * value[i];
            }
          }
        }
      }
      tile = next;
      DYRATE_UNROLL
      for (int r = 0; r < kStep; ++r) {
        row[r] = next_row[r];
        next_row[r] = after[r];
      }
    }

    DYRATE_UNROLL
    for (int g = 0; g < kGroup; ++g) {
      DYRATE_UNROLL
      for (int p = 0; p < kPieces; ++p) {
        DYRATE_UNROLL
        for (int i = 0; i < kWide; ++i) shared.teams.sum[team][g][(p * kLanes + lane) * kWide + i] = sum[g][p][i];
      }
      if (lane == 0) {
        shared.common.stat[team][g][0] = top[g];
        shared.common.stat[team][g][1] = norm[g];
        shared.common.stat[team][g][2] = image[g];
      }
    }
    block.sync();
  }
};

/// Every row that is read in groups starts at a multiple of 16 bytes and has whole groups.
inline bool aligned(const AttentionCall& call) {
  const int size = call.type == Type::kFloat32 ? 4 : 2;
  const auto fits = [size](const void* address, std::initializer_list<std::int64_t> elements) {
    bool good = reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
    for (std::int64_t count : elements) good = good && count * size % 16 == 0;
    return good;
  };
  bool good = fits(call.query, {call.query_stride[0], call.query_stride[1], call.dim});
  good = good && fits(call.key, {call.key_stride[0], call.key_stride[1], call.key_stride[2]});
  good = good && fits(call.value, {call.value_stride[0], call.value_stride[1], call.value_stride[2], call.value_dim});
  if (call.new_key) {
    good = good && fits(call.new_key, {call.new_key_stride[0], call.new_key_stride[1]});
    good = good && fits(call.new_value, {call.new_value_stride[0], call.new_value_stride[1]});
  }
  return good;
}

}  // namespace dyrate
