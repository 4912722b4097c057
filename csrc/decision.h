// From logits to the kept list: importance, predictor, count, selection.
//
// Formulas and ties are those of dyrate_kernels.ops.reference. Selection: a radix select finds the threshold, eight bits a pass, in a
// histogram of integers (whose sums do not depend on the order); a prefix sum then collects in ascending order.
#pragma once

#include "numbers.h"

namespace dyrate {

constexpr int kBins = 256;  // of a radix pass; a thread for each
constexpr int kDecideWarps = kDecideThreads / kWarp;
constexpr int kCachedBytes = 16384;  // of keys held in shared memory; longer rows are read again in every pass
static_assert(kDecideThreads == kBins, "a thread looks after one bin");

struct SelectShared {
  alignas(8) unsigned char key[kCachedBytes];
  int histogram[kBins];
  int warp_total[kDecideWarps];
  int candidates, digit, needed;
};

struct PredictShared {
  std::uint32_t key[kDecideWarps];
  int index[kDecideWarps];
  int best;
};

/// Where the scores of one sequence are, and which tokens can be chosen.
struct Scores {
  const void* score;
  std::int64_t stride;
  Type type;
  bool fresh;  // written in this launch
  const std::uint8_t* alive;
  std::int64_t alive_stride;
  int n;

  /// 0 for tokens that cannot be chosen. Key: std::uint32_t, or std::uint64_t for float64 scores.
  template <class Key, class Block>
  DYRATE_HD Key key(Block& block, int token) const {
    if (token >= n || (alive && !alive[token * alive_stride])) return 0;
    const std::int64_t at = token * stride;
    if constexpr (sizeof(Key) == 8) {
      return order_key(static_cast<const double*>(score)[at]);
    } else {
      return order_key(fresh ? block.load_shared_by_blocks(static_cast<const float*>(score) + at) : load_float(score, at, type));
    }
  }
};

/// Inclusive prefix sum over the threads of the block; `*total` is that of all. Every thread calls it.
template <class Block>
DYRATE_HD int prefix_sum(Block& block, int value, int (&warp_total)[kDecideWarps], int* total) {
  int sum = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int below = block.shuffle_up(sum, distance);
    if (block.lane() >= distance) sum += below;
  }
  block.sync();  // the totals of an earlier call have been read
  if (block.lane() == kWarp - 1) warp_total[block.warp()] = sum;
  block.sync();
  int all = 0;
  for (int warp = 0; warp < kDecideWarps; ++warp) {
    if (warp == block.warp()) sum += all;
    all += warp_total[warp];
  }
  *total = all;
  return sum;
}

/// Writes the `count` highest scores as ascending indices to kept[0 .. width), -1 past them; returns how many.
template <class Key, class Block>
DYRATE_HD int select_row(Block& block, SelectShared& shared, const Scores& scores, int count, int width, std::int32_t* kept) {
  constexpr int kCached = kCachedBytes / static_cast<int>(sizeof(Key));
  Key* cache = reinterpret_cast<Key*>(shared.key);
  const bool cached = scores.n <= kCached;
  const int thread = block.thread();

  if (thread == 0) shared.candidates = 0;
  block.sync();
  int mine = 0;
  for (int token = thread; token < scores.n; token += kDecideThreads) {
    const Key key = scores.key<Key>(block, token);
    if (cached) cache[token] = key;
    mine += key != 0;
  }
  block.add_shared(&shared.candidates, mine);
  block.sync();
  int n_kept = count < shared.candidates ? count : shared.candidates;
  if (n_kept < 0) n_kept = 0;
  for (int place = n_kept + thread; place < width; place += kDecideThreads) kept[place] = -1;
  if (n_kept == 0) return 0;

  Key threshold = 0;
  int needed = n_kept;  // of the tokens that share the threshold's digits so far
  for (int shift = 8 * (static_cast<int>(sizeof(Key)) - 1); shift >= 0; shift -= 8) {
    shared.histogram[thread] = 0;
    block.sync();
    for (int token = thread; token < scores.n; token += kDecideThreads) {
      const Key key = cached ? cache[token] : scores.key<Key>(block, token);
      const bool inside = shift + 8 == 8 * static_cast<int>(sizeof(Key)) || (key >> (shift + 7) >> 1) == (threshold >> (shift + 7) >> 1);
      if (key != 0 && inside) block.add_shared(&shared.histogram[static_cast<int>(key >> shift & (kBins - 1))], 1);
    }
    block.sync();
    int total;
    const int own = shared.histogram[kBins - 1 - thread];  // from the highest digit down
    const int at_least = prefix_sum(block, own, shared.warp_total, &total);
    if (at_least >= needed && at_least - own < needed) {  // one thread
      shared.digit = kBins - 1 - thread;
      shared.needed = needed - (at_least - own);
    }
    block.sync();
    threshold |= static_cast<Key>(shared.digit) << shift;
    needed = shared.needed;
  }

  int above = 0, ties = 0;  // tokens over the threshold and at it, so far
  for (int start = 0; start < scores.n; start += kDecideThreads) {
    const int token = start + thread;
    Key key = 0;
    if (token < scores.n) key = cached ? cache[token] : scores.key<Key>(block, token);
    const int over = key > threshold, tie = key == threshold;
    int total;
    const int before = prefix_sum(block, over << 16 | tie, shared.warp_total, &total) - (over << 16 | tie);
    const int ties_before = ties + (before & 0xFFFF);
    const int place = above + (before >> 16) + (ties_before < needed ? ties_before : needed);
    if (over || (tie && ties_before < needed)) kept[place] = token;
    above += total >> 16;
    ties += total & 0xFFFF;
  }
  return n_kept;
}

/// argmax over r of sum_f mass[f] * weight[r, f] + bias[r]: the first of equal ones, NaN last.
template <class Block>
DYRATE_HD int predict_class(Block& block, PredictShared& shared, const void* mass, Type mass_type, int features, int classes,
                            const void* weight, Type weight_type, const std::int64_t (&weight_stride)[2], const void* bias,
                            Type bias_type, std::int64_t bias_start, std::int64_t bias_stride) {
  std::uint32_t best = 0;
  int index = 0;
  for (int r = block.warp(); r < classes; r += kDecideWarps) {  // a warp for each class
    float logit = 0.f;
    for (int f = block.lane(); f < features; f += kWarp) {
      logit += load_float(mass, f, mass_type) * load_float(weight, r * weight_stride[0] + f * weight_stride[1], weight_type);
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) logit += block.shuffle_xor(logit, distance);
    const std::uint32_t key = order_key(logit + load_float(bias, bias_start + r * bias_stride, bias_type));
    if (key > best) {
      best = key;
      index = r;
    }
  }
  if (block.lane() == 0) {
    shared.key[block.warp()] = best;
    shared.index[block.warp()] = index;
  }
  block.sync();
  if (block.thread() == 0) {
    std::uint32_t highest = 0;
    shared.best = 0;
    for (int warp = 0; warp < kDecideWarps; ++warp) {
      const bool better = shared.key[warp] > highest || (shared.key[warp] == highest && highest && shared.index[warp] < shared.best);
      if (better) {
        highest = shared.key[warp];
        shared.best = shared.index[warp];
      }
    }
  }
  block.sync();
  return shared.best;
}

/// floor(n * (1 - rate) + 1e-6) in [0, n]; NaN keeps all.
DYRATE_HD int count_for_rate(int n, double rate) {
  const double kept = n * (1.0 - rate) + 1e-6;
  if (!(kept < n)) return n;  // NaN too
  return kept < 0.0 ? 0 : static_cast<int>(kept);
}

/// See DecideCall. The last block of a sequence decides.
struct DecideKernel {
  static constexpr int kThreads = kDecideThreads;
  static constexpr int kBlocks = 2;
  static constexpr int kParts = kDecideThreads / kColumns;  // of the heads; a thread sums one part for one column

  struct Shared {
    union {
      float part[kParts][kColumns];
      PredictShared predict;
      SelectShared select;
    };
    int flag;
  };

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const DecideCall& call) {
    const std::int64_t b = block.index().y;
    const int n = call.n_visual[b];
    importance(block, shared, call, b, n);
    if (!call.decide) return;
    if (!block.last_of(call.counters + b, block.grid().x, &shared.flag)) return;
    decide(block, shared, call, b, n);
  }

  /// The mean over heads of the probability, always summed in the same order.
  template <class Block>
  static DYRATE_HD void importance(Block& block, Shared& shared, const DecideCall& call, std::int64_t b, int n) {
    float* row = call.importance + b * call.visual_capacity;
    int n_read = n, columns = call.visual_capacity;
    const std::int32_t* list = nullptr;
    if (call.kept_in) {  // one block: it zeroes the row, then fills in the listed places
      list = call.kept_in + b * call.kept_in_stride;
      n_read = columns = call.n_kept_in[b];
      for (int column = block.thread(); column < call.visual_capacity; column += kThreads) row[column] = 0.f;
    }
    const int column_here = block.thread() % kColumns, part = block.thread() / kColumns;
    const int first = part * call.heads / kParts, last = (part + 1) * call.heads / kParts;
    for (int start = static_cast<int>(block.index().x) * kColumns; start < columns; start += static_cast<int>(block.grid().x) * kColumns) {
      const int column = start + column_here;
      float sum = 0.f;
      if (column < n_read) {
        DYRATE_UNROLL_BY(8)
        for (int h = first; h < last; ++h) {
          const std::int64_t head = b * call.heads + h;
          const float logit = call.logits[head * call.logit_capacity + column];
          const float probability = exp2f(logit - call.head_stat[head * 2]) * call.head_stat[head * 2 + 1];
          sum += logit == -INFINITY ? 0.f : probability;
        }
      }
      shared.part[part][column_here] = sum;
      block.sync();
      if (part == 0 && column < columns) {
        float all = 0.f;
        for (int other = 0; other < kParts; ++other) all += shared.part[other][column_here];
        row[list ? list[column] : column] = all / call.heads;
      }
      block.sync();
    }
  }

  template <class Block>
  static DYRATE_HD void decide(Block& block, Shared& shared, const DecideCall& call, std::int64_t b, int n) {
    double rate = 0.0;
    int count;
    if (call.classes) {
      const int features = call.heads * kTypes;
      const int best = predict_class(block, shared.predict, call.mass + b * features, Type::kFloat32, features, call.classes, call.weight,
                                     call.weight_type, call.weight_stride, call.bias, call.bias_type, b * call.bias_stride[0],
                                     call.bias_stride[1]);
      rate = call.rates[best];
      count = count_for_rate(n, rate);
      block.sync();  // the prediction shares its memory with the selection
    } else {
      count = call.count[b];
    }
    if (call.max_kept && call.max_kept[b] < count) count = call.max_kept[b];

    Scores scores;
    scores.fresh = call.score == nullptr;
    scores.score = scores.fresh ? call.importance + b * call.visual_capacity : call.score;
    scores.type = scores.fresh ? Type::kFloat32 : call.score_type;
    scores.stride = scores.fresh ? 1 : call.score_stride[1];
    scores.alive = call.alive ? call.alive + b * call.alive_stride[0] : nullptr;
    scores.alive_stride = call.alive_stride[1];
    scores.n = n < call.visual_capacity ? n : call.visual_capacity;
    if (!scores.fresh) scores.score = offset(call.score, b * call.score_stride[0], call.score_type);
    std::int32_t* kept = call.kept + b * call.visual_capacity;
    const bool wide = scores.type == Type::kFloat64;
    const int n_kept = wide ? select_row<std::uint64_t>(block, shared.select, scores, count, call.visual_capacity, kept)
                            : select_row<std::uint32_t>(block, shared.select, scores, count, call.visual_capacity, kept);
    if (block.thread() == 0) {
      call.n_kept[b] = n_kept;
      call.rate[b] = call.classes ? rate : n > 0 ? 1.0 - static_cast<double>(n_kept) / n : 0.0;
    }
  }

  static DYRATE_HD const void* offset(const void* base, std::int64_t elements, Type type) {
    const int size = type == Type::kFloat64 ? 8 : type == Type::kFloat32 ? 4 : 2;
    return static_cast<const char*>(base) + elements * size;
  }
};

/// See SelectCall.
struct SelectKernel {
  static constexpr int kThreads = kDecideThreads;
  static constexpr int kBlocks = 2;
  using Shared = SelectShared;

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const SelectCall& call) {
    const std::int64_t b = block.index().x;
    Scores scores;
    scores.fresh = false;
    scores.score = DecideKernel::offset(call.score, b * call.score_stride[0], call.score_type);
    scores.type = call.score_type;
    scores.stride = call.score_stride[1];
    scores.alive = call.alive ? call.alive + b * call.alive_stride[0] : nullptr;
    scores.alive_stride = call.alive_stride[1];
    scores.n = call.n_visual[b] < call.tokens ? call.n_visual[b] : call.tokens;
    std::int32_t* kept = call.kept + b * call.tokens;
    const int n_kept = call.score_type == Type::kFloat64
                           ? select_row<std::uint64_t>(block, shared, scores, call.count[b], call.tokens, kept)
                           : select_row<std::uint32_t>(block, shared, scores, call.count[b], call.tokens, kept);
    if (block.thread() == 0) call.n_kept[b] = n_kept;
  }
};

/// See PredictCall.
struct PredictKernel {
  static constexpr int kThreads = kDecideThreads;
  static constexpr int kBlocks = 2;
  using Shared = PredictShared;

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const PredictCall& call) {
    const std::int64_t b = block.index().x;
    const void* mass = DecideKernel::offset(call.mass, b * call.features, call.mass_type);
    const int best = predict_class(block, shared, mass, call.mass_type, call.features, call.classes, call.weight, call.weight_type,
                                   call.weight_stride, call.bias, call.bias_type, b * call.bias_stride[0], call.bias_stride[1]);
    if (block.thread() == 0) {
      call.rate[b] = call.rates[best];
      call.index[b] = best;
    }
  }
};

}  // namespace dyrate
