// Split-K flash decoding of 16-bit rows through tiles in shared memory, for sm_80 and later. What it computes, and how parts become results,
// is in attention.h.
//
// Each warp has a ring of tiles of its own and a softmax of its own, so the main loop has no barrier but those of a warp. `stages` tiles are
// on their way or being read; the row numbers of the one behind them are being read. A tile is copied by 16 bytes a lane (cp.async), or on
// sm_90 by one bulk copy for each run of rows that are neighbours there and here (`bulk`), a row at least.
//
// One query head: a row is shared by a team of lanes, products are float32. Up to 8 or 16 heads: the rows of a tile are the 16 rows of
// mma.m16n8k16 and the heads its 8 columns, so that 8 heads cost 16 + 16 such instructions for 16 rows of 128 elements: K q^T first, then
// V^T p^T, whose p is rounded to the elements' type. A logit of head c lies with lanes c / 2 + 4 * i, so factors need no shuffle.
#pragma once

#include <type_traits>

#include "attention.h"

namespace dyrate {

/// One query head. Everything of the softmax is a lane's own but logits, which a team adds up.
template <class Element, int kDim>
struct OneHead {
  static constexpr int kGroup = 1;
  static constexpr int kWide = kPerGroup<Element>;
  static constexpr int kLanes = kDim / kWide;        // of a team
  static constexpr int kTeams = kAttentionThreads / kLanes;
  static constexpr int kRows = staged_rows(1, kDim);  // of a warp's tile
  static constexpr int kPitch = kDim;
  static constexpr int kStep = kRows * kLanes / kWarp;  // of a team's

  float query[kWide], sum[kWide];
  float top, norm, image;

  template <class Block>
  DYRATE_HD void begin(Block& block, const AttentionCall& call, const Work<Element>& work) {
    const int column = block.lane() % kLanes * kWide;
    Bytes16 packed{{0, 0, 0, 0}};
    const Element* row = static_cast<const Element*>(call.query) + work.b * call.query_stride[0] + work.head_of_sequence * call.query_stride[1];
    if (column < call.dim) packed = block.load16(row + column);
    unpack(packed, query, static_cast<const Element*>(nullptr));
    DYRATE_UNROLL
    for (int i = 0; i < kWide; ++i) {
      query[i] *= call.scale * kLog2E;
      sum[i] = 0.f;
    }
    top = -kInfinity;
    norm = image = 0.f;
  }

  /// \param live  a bit for each row of the tile that is to be read
  template <class Block>
  DYRATE_HD void add(Block& block, const AttentionCall& call, const Work<Element>& work, typename Block::Place keys, typename Block::Place values, int first_place,
                     std::uint32_t live) {
    const int lane = block.lane() % kLanes, team = block.lane() / kLanes;
    const int mine = (team * kPitch + lane * kWide) * static_cast<int>(sizeof(Element));
    constexpr int kApart = kWarp / kLanes * kPitch * static_cast<int>(sizeof(Element));  // bytes from one of the team's rows to the next
    float logit[kStep];
    DYRATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      float key[kWide];
      unpack(block.load16_at(keys + mine + r * kApart), key, static_cast<const Element*>(nullptr));
      logit[r] = 0.f;
      DYRATE_UNROLL
      for (int i = 0; i < kWide; ++i) logit[r] += query[i] * key[i];
    }
    DYRATE_UNROLL
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      DYRATE_UNROLL
      for (int r = 0; r < kStep; ++r) logit[r] += block.shuffle_xor(logit[r], distance);
    }
    float high = top;
    DYRATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      const int row = r * (kWarp / kLanes) + team, place = first_place + row;
      logit[r] = (live >> row & 1u) == 0 ? -kInfinity : logit[r] == -kInfinity ? -FLT_MAX : logit[r];
      high = fmaxf(high, logit[r]);
      if (call.write_logits && lane == 0 && place < work.total) call.logits[work.first_head * call.logit_capacity + place] = logit[r];
    }
    const float finite = high == -kInfinity ? 0.f : high;
    const float factor = block.power(top - finite);
    top = high;
    norm *= factor;
    image *= factor;
    DYRATE_UNROLL
    for (int i = 0; i < kWide; ++i) sum[i] *= factor;
    DYRATE_UNROLL
    for (int r = 0; r < kStep; ++r) {
      const int row = r * (kWarp / kLanes) + team;
      const float weight = block.power(logit[r] - finite);
      norm += weight;
      image += first_place + row < work.n_read ? weight : 0.f;
      if (work.value) {
        float value[kWide];
        unpack(block.load16_at(values + mine + r * kApart), value, static_cast<const Element*>(nullptr));
        DYRATE_UNROLL
        for (int i = 0; i < kWide; ++i) sum[i] += weight * value[i];
      }
    }
  }

  template <class Block, class Shared, class Teams>
  DYRATE_HD void end(Block& block, Shared& shared, Teams& teams) const {
    const int lane = block.lane() % kLanes, team = block.thread() / kLanes;
    DYRATE_UNROLL
    for (int i = 0; i < kWide; ++i) teams.sum[team][0][lane * kWide + i] = sum[i];
    if (lane == 0) {
      shared.stat[team][0][0] = top;
      shared.stat[team][0][1] = norm;
      shared.stat[team][0][2] = image;
    }
  }
};

/// Up to 8 * kParts query heads, by tensor cores. A lane holds the softmax of heads 8 * n + 2 * (lane % 4) and the next one, with its sums
/// over rows lane / 4 and lane / 4 + 8 of each tile.
template <class Element, int kDim, int kParts>
struct ManyHeads {
  static constexpr int kGroup = 8 * kParts;
  static constexpr int kTeams = kAttentionThreads / kWarp;
  static constexpr int kRows = staged_rows(kGroup, kDim);
  static constexpr int kPitch = staged_pitch(kGroup, kDim);  // rows of a matrix start in different banks
  static constexpr int kSteps = kDim / 16;
  static_assert(kRows == 16, "rows of a matrix of the tensor cores");

  std::uint32_t query[kParts][kSteps][2];
  float sum[kParts][kSteps][4];
  float top[kParts][2], norm[kParts][2], image[kParts][2];
  float* line;  // of logits, of this lane's first head and row
  bool writes[kParts][2];

  template <class Block>
  DYRATE_HD void begin(Block& block, const AttentionCall& call, const Work<Element>& work) {
    DYRATE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      const int head = 8 * n + block.lane() / 4;
      const Element* row = static_cast<const Element*>(call.query) + work.b * call.query_stride[0] + (work.head_of_sequence + head) * call.query_stride[1];
      DYRATE_UNROLL
      for (int s = 0; s < kSteps; ++s) {
        DYRATE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int column = 16 * s + 8 * half + 2 * (block.lane() % 4);
          query[n][s][half] = head < work.heads_here && column < call.dim ? block.load4(row + column) : 0;
        }
        DYRATE_UNROLL
        for (int i = 0; i < 4; ++i) sum[n][s][i] = 0.f;
      }
      DYRATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        top[n][i] = -kInfinity;
        norm[n][i] = image[n][i] = 0.f;
        writes[n][i] = call.write_logits && 8 * n + 2 * (block.lane() % 4) + i < work.heads_here;
      }
    }
    line = call.logits + ((work.first_head + 2 * (block.lane() % 4)) * call.logit_capacity + block.lane() / 4);
  }

  template <class Block>
  DYRATE_HD void add(Block& block, const AttentionCall& call, const Work<Element>& work, typename Block::Place keys, typename Block::Place values, int first_place,
                     std::uint32_t live) {
    const int lane = block.lane(), row = lane / 4;
    float logit[kParts][4], other[kParts][4];  // of every second step: products that do not wait for each other
    DYRATE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      DYRATE_UNROLL
      for (int i = 0; i < 4; ++i) logit[n][i] = other[n][i] = 0.f;
    }
    constexpr int kSize = sizeof(Element);
    const typename Block::Place from = keys + (lane % 16 * kPitch + lane / 16 * 8) * kSize;
    DYRATE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      std::uint32_t key[4];
      block.template load_matrices<false>(key, from + 16 * s * kSize);
      DYRATE_UNROLL
      for (int n = 0; n < kParts; ++n) block.template multiply<Element>(s % 2 ? other[n] : logit[n], key, query[n][s]);
    }

    bool moved = false;
    float factor[kParts][2];
    std::uint32_t weights[kParts][2];
    const float scale = call.scale * kLog2E;
    DYRATE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      DYRATE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int its = row + i / 2 * 8;
        const float scaled = (logit[n][i] + other[n][i]) * scale;
        logit[n][i] = (live >> its & 1u) == 0 ? -kInfinity : scaled == -kInfinity ? -FLT_MAX : scaled;
        if (writes[n][i % 2] && first_place + its < work.total) {
          (line + static_cast<std::int64_t>(8 * n + i % 2) * call.logit_capacity)[first_place + i / 2 * 8] = logit[n][i];
        }
      }
      DYRATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        float high = fmaxf(top[n][i], fmaxf(logit[n][i], logit[n][i + 2]));
        DYRATE_UNROLL
        for (int distance = 4; distance < kWarp; distance *= 2) high = fmaxf(high, block.shuffle_xor(high, distance));
        const float finite = high == -kInfinity ? 0.f : high;
        factor[n][i] = block.power(top[n][i] - finite);
        moved = moved || factor[n][i] != 1.f;
        top[n][i] = high;
        norm[n][i] *= factor[n][i];
        image[n][i] *= factor[n][i];
        DYRATE_UNROLL
        for (int below = 0; below < 2; ++below) {
          const float weight = block.power(logit[n][i + 2 * below] - finite);
          logit[n][i + 2 * below] = weight;
          norm[n][i] += weight;
          image[n][i] += first_place + row + 8 * below < work.n_read ? weight : 0.f;
        }
      }
    }
    if (!work.value) return;
    if (block.ballot(moved)) {
      DYRATE_UNROLL
      for (int n = 0; n < kParts; ++n) {
        DYRATE_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          DYRATE_UNROLL
          for (int i = 0; i < 4; ++i) sum[n][s][i] *= factor[n][i % 2];
        }
      }
    }
    DYRATE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      DYRATE_UNROLL
      for (int below = 0; below < 2; ++below) {
        weights[n][below] = block.transpose_matrix(block.template pack<Element>(logit[n][2 * below], logit[n][2 * below + 1]));
      }
    }
    const typename Block::Place value_from = values + ((lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8) * kSize;
    DYRATE_UNROLL
    for (int s = 0; s < kSteps; ++s) {
      std::uint32_t value[4];
      block.template load_matrices<true>(value, value_from + 16 * s * kSize);
      DYRATE_UNROLL
      for (int n = 0; n < kParts; ++n) block.template multiply<Element>(sum[n][s], value, weights[n]);
    }
  }

  template <class Block, class Shared, class Teams>
  DYRATE_HD void end(Block& block, Shared& shared, Teams& teams) {
    const int lane = block.lane(), warp = block.warp();
    DYRATE_UNROLL
    for (int n = 0; n < kParts; ++n) {
      DYRATE_UNROLL
      for (int i = 0; i < 2; ++i) {
        DYRATE_UNROLL
        for (int distance = 4; distance < kWarp; distance *= 2) {
          norm[n][i] += block.shuffle_xor(norm[n][i], distance);
          image[n][i] += block.shuffle_xor(image[n][i], distance);
        }
        const int head = 8 * n + 2 * (lane % 4) + i;
        if (lane / 4 == 0) {
          shared.stat[warp][head][0] = top[n][i];
          shared.stat[warp][head][1] = norm[n][i];
          shared.stat[warp][head][2] = image[n][i];
        }
        DYRATE_UNROLL
        for (int s = 0; s < kSteps; ++s) {
          DYRATE_UNROLL
          for (int below = 0; below < 2; ++below) teams.sum[warp][head][16 * s + lane / 4 + 8 * below] = sum[n][s][i + 2 * below];
        }
      }
    }
  }
};

/// kDim: dim and value_dim rounded up. kUnit: query heads of a unit, 1, 8 or 16. Rows start at multiples of 16 bytes and have whole groups.
template <class Element, int kDim, int kUnit, bool kBulk>
struct StagedKernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = staged_blocks(kUnit);
  static constexpr int kArchitecture = kBulk ? 90 : 80;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kSize = sizeof(Element);
  using Heads = std::conditional_t<kUnit == 1, OneHead<Element, kDim>, ManyHeads<Element, kDim, kUnit == 1 ? 1 : kUnit / 8>>;
  using Together = Combination<Element, kDim, Heads::kGroup, Heads::kTeams, kThreads>;
  static constexpr int kRows = Heads::kRows, kPitch = Heads::kPitch;
  static constexpr int kTile = kWarps * kRows;
  static constexpr int kChunks = kDim / kPerGroup<Element>;  // 16-byte groups of a row
  static constexpr int kTensorBytes = kRows * kPitch * kSize;  // of a warp's tile: keys, then values
  static constexpr int kStageBytes = 2 * kTensorBytes;

  struct Shared {
    typename Together::Shared common;
    alignas(8) std::uint64_t arrived[kWarps][kMostStages];
    std::uint32_t live[kWarps][kMostStages];  // a bit for each row of a tile
  };
  static_assert(kStageBytes * kWarps == staged_bytes(kUnit, kDim) && sizeof(Shared) <= staged_rest(kUnit), "as the plan counts");
  static_assert(sizeof(typename Together::Teams) <= 2 * staged_bytes(kUnit, kDim), "the ring holds the teams' sums afterwards");
  static_assert(sizeof(typename Together::Splits) <= 2 * staged_bytes(kUnit, kDim), "the ring holds the splits' parts afterwards");

  /// What a lane copies with: its column of the rows of a tile, or bulk copies of whole rows.
  template <class Block>
  struct Ring {
    typename Block::Place begin, live, arrived;  // of the warp
    const unsigned char *key, *value, *new_key, *new_value;
    std::uint32_t key_step, value_step;  // bytes from row to row
    int new_row, offset;                 // offset: of the lane's column in its first row
    bool has_key, has_value;
  };

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const AttentionCall& call) {
    Work<Element> work;
    if (!work.open(block, call, Heads::kGroup, kThreads)) return;
    Heads heads;
    heads.begin(block, call, work);
    attend(block, shared, call, work, heads);
    block.sync();  // all warps are done with their rings
    typename Together::Teams& teams = *reinterpret_cast<typename Together::Teams*>(block.extra());
    heads.end(block, shared.common, teams);
    block.sync();
    Together::run(block, shared.common, teams, *reinterpret_cast<typename Together::Splits*>(block.extra()), call, work);
  }

  /// Which stage is next, and the parity of how often it was.
  struct Turn {
    int stage = 0, round = 0;
    DYRATE_HD void advance(int stages) {
      if (++stage < stages) return;
      stage = 0;
      round ^= 1;
    }
  };

  template <class Block>
  static DYRATE_HD void attend(Block& block, Shared& shared, const AttentionCall& call, const Work<Element>& work, Heads& heads) {
    const int warp = block.warp(), lane = block.lane(), stages = static_cast<int>(block.keep(static_cast<std::uint32_t>(call.stages)));
    const Ring<Block> ring = make_ring(block, shared, call, work, stages);
    const int tiles = (work.total + kTile - 1) / kTile;
    const int first = static_cast<int>(static_cast<std::int64_t>(work.split) * tiles / work.splits);
    const int last = static_cast<int>(static_cast<std::int64_t>(work.split + 1) * tiles / work.splits);
    const auto locate = [&](int tile) {
      return lane < kRows && tile < last ? work.locate(call, tile * kTile + warp * kRows + lane) : -1;
    };
    Turn in, out;
    int row = locate(first);
    for (int t = first; t < first + stages - 1; ++t) {
      start(block, call, ring, in, row, t < last);
      in.advance(stages);
      row = locate(t + 1);
    }
    for (int t = first; t < last; ++t) {
      // The stage that is filled now is that of the tile before, which all lanes are done with behind the barrier in `start`.
      const int next = t + stages - 1;
      if (!kBulk) block.wait_copies(stages - 2);
      start(block, call, ring, in, row, next < last);
      in.advance(stages);
      row = locate(next + 1);
      const std::uint32_t live = block.load4_at(ring.live + out.stage * 4);
      const typename Block::Place keys = ring.begin + out.stage * kStageBytes, values = keys + kTensorBytes;
      if (kBulk) {
        block.wait_bytes(ring.arrived + out.stage * 8, out.round);
        if (live != (1u << kRows) - 1) {  // values that no copy wrote are old; such keys make logits that nobody looks at
          for (int i = lane; i < kRows * kChunks; i += kWarp) {
            const int at = i / kChunks * kPitch * kSize + i % kChunks * 16;
            if (live >> i / kChunks & 1u) continue;
            block.clear16_at(values + at);
          }
          block.fence_proxy();
          block.sync_warp();
        }
      }
      heads.add(block, call, work, keys, values, t * kTile + warp * kRows, live);
      out.advance(stages);
    }
  }

  template <class Block>
  static DYRATE_HD Ring<Block> make_ring(Block& block, Shared& shared, const AttentionCall& call, const Work<Element>& work, int stages) {
    const int warp = block.warp(), lane = block.lane();
    Ring<Block> ring;
    ring.begin = block.place(block.extra() + warp * stages * kStageBytes);
    ring.live = block.place(shared.live[warp]);
    ring.arrived = block.place(shared.arrived[warp]);
    // columns that no copy writes are zero
    for (int i = lane; i < stages * 2 * kRows * kChunks; i += kWarp) {
      const int row = i / kChunks, column = i % kChunks;
      if (column * kPerGroup<Element> < (row / kRows % 2 ? call.value_dim : call.dim)) continue;
      block.clear16_at(ring.begin + row * kPitch * kSize + column * 16);
    }
    if (kBulk) {
      if (lane < stages) block.expect_arrivals(ring.arrived + lane * 8, 1);
      block.fence_proxy();
    }
    const int column = kBulk ? 0 : lane % kChunks * kPerGroup<Element>;
    const auto at_column = [&](const Element* row) {
      return block.keep(row ? reinterpret_cast<const unsigned char*>(row + column) : nullptr);
    };
    ring.key = at_column(work.key);
    ring.value = at_column(work.value);
    ring.new_key = at_column(work.new_key);
    ring.new_value = at_column(work.new_value);
    ring.key_step = block.keep(static_cast<std::uint32_t>(call.key_stride[2]) * kSize);
    ring.value_step = block.keep(static_cast<std::uint32_t>(call.value_stride[2]) * kSize);
    ring.new_row = work.new_row;
    ring.offset = (lane / kChunks * kPitch + column) * kSize;
    ring.has_key = column < call.dim;
    ring.has_value = work.value && column < call.value_dim;
    return ring;
  }

  /// Starts the copies of a tile; lane i knows row i. Meets the warp once: who still reads that stage has not come. \param any  there is such
  /// a tile
  template <class Block>
  static DYRATE_HD void start(Block& block, const AttentionCall& call, const Ring<Block>& ring, const Turn& in, int row, bool any) {
    const std::uint32_t live = block.ballot(row >= 0);
    block.sync_warp();
    if (block.lane() == 0) block.store4_at(ring.live + in.stage * 4, live);
    if constexpr (kBulk) {
      if (any) start_bulk(block, call, ring, in, row, live);
      return;
    }
    if (any) {
      const int first = block.lane() / kChunks;
      const typename Block::Place keys = ring.begin + (in.stage * kStageBytes + ring.offset), values = keys + kTensorBytes;
      if (block.ballot(block.lane() < kRows && (row < 0 || row == ring.new_row)) == 0) {
        DYRATE_UNROLL
        for (int r = 0; r < kRows; r += kWarp / kChunks) {
          const std::uint64_t its = static_cast<std::uint32_t>(block.shuffle(row, r + first));
          block.copy16(keys + r * kPitch * kSize, ring.key + its * ring.key_step, ring.has_key);
          block.copy16(values + r * kPitch * kSize, ring.value + its * ring.value_step, ring.has_value);
        }
      } else {
        DYRATE_UNROLL_BY(1)
        for (int r = 0; r < kRows; r += kWarp / kChunks) {
          const int its = block.shuffle(row, r + first);
          const bool fresh = its == ring.new_row;
          const std::uint64_t at = its < 0 ? 0u : static_cast<std::uint32_t>(its);
          block.copy16(keys + r * kPitch * kSize, fresh ? ring.new_key : ring.key + at * ring.key_step, ring.has_key, its >= 0);
          block.copy16(values + r * kPitch * kSize, fresh ? ring.new_value : ring.value + at * ring.value_step, ring.has_value, its >= 0);
        }
      }
    }
    block.commit_copies();
  }

  /// A copy for each run of rows that follow each other in memory and fill their places in the tile.
  template <class Block>
  static DYRATE_HD void start_bulk(Block& block, const AttentionCall& call, const Ring<Block>& ring, const Turn& in, int row, std::uint32_t live) {
    const int lane = block.lane();
    const int key_bytes = call.dim * kSize, value_bytes = ring.has_value ? call.value_dim * kSize : 0;
    const typename Block::Place arrived = ring.arrived + in.stage * 8, keys = ring.begin + (in.stage * kStageBytes + lane * kPitch * kSize);
    if (lane == 0) block.expect_bytes(arrived, count_bits(live) * (key_bytes + value_bytes));
    const auto fills = [](std::uint32_t bytes, std::uint32_t step) { return bytes == kPitch * kSize && step == kPitch * kSize; };
    const bool dense = fills(key_bytes, ring.key_step) && (!value_bytes || fills(value_bytes, ring.value_step));
    const bool fresh = row == ring.new_row;
    const int before = block.shuffle_up(row, 1);
    const bool follows = dense && lane > 0 && before >= 0 && row == before + 1 && !fresh;
    const std::uint32_t starts = block.ballot(!follows) >> lane >> 1;
    if (row < 0 || follows) return;
    int rows = starts ? lowest_bit(starts) + 1 : kWarp - lane;
    if (rows > kRows - lane) rows = kRows - lane;
    const std::uint64_t at = static_cast<std::uint32_t>(row);
    block.copy_bulk(keys, fresh ? ring.new_key : ring.key + at * ring.key_step, rows * key_bytes, arrived);
    if (value_bytes) block.copy_bulk(keys + kTensorBytes, fresh ? ring.new_value : ring.value + at * ring.value_step, rows * value_bytes, arrived);
  }
};

}  // namespace dyrate
