// Rows that move in place: hole filling for eviction, reordering for beams. Many tensors in one launch.
#pragma once

#include "numbers.h"

namespace dyrate {

/// With n rows kept, the kept rows at or past n move, in order, into the rows below n that are not kept, in order. The i-th of these
/// holes is i + (how many kept rows come before it), found by bisection; so every thread finds its own moves, no two moves touch a
/// common row, and any number of blocks may work at once.
struct Holes {
  const std::int32_t* kept;  // ascending
  int n, stay;               // rows kept; those of them that are below n

  static DYRATE_HD Holes of(const std::int32_t* kept, int n) {
    int low = 0, high = n;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (kept[middle] < n) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return {kept, n, low};
  }
  DYRATE_HD int moves() const { return n - stay; }
  DYRATE_HD int source(int move) const { return kept[stay + move]; }
  DYRATE_HD int target(int move) const {
    int low = 0, high = stay;  // kept rows before the hole
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (kept[middle] - middle <= move) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return move + low;
  }
};

/// See CompactCall.
struct CompactKernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  static constexpr int kBatch = 8;  // moves that a warp finds at once
  static constexpr int kInFlight = 4;
  struct Shared {};

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared&, const CompactCall& call) {
    const std::int64_t b = block.index().z;
    const int n = call.n_kept[b];
    if (n >= call.n_visual[b]) return;
    const Holes holes = Holes::of(call.kept + b * call.kept_stride, n);
    const Rows& rows = call.rows[block.index().y];
    char* base = reinterpret_cast<char*>(rows.address) + b * rows.sequence_stride;
    constexpr int kWarps = kThreads / kWarp;
    const int step = static_cast<int>(block.grid().x) * kWarps * kBatch;
    for (int first = (static_cast<int>(block.index().x) * kWarps + block.warp()) * kBatch; first < holes.moves(); first += step) {
      int source = 0, target = 0;
      const int move = first + block.lane();
      if (block.lane() < kBatch && move < holes.moves()) {
        source = holes.source(move);
        target = holes.target(move);
      }
      const int here = holes.moves() - first < kBatch ? holes.moves() - first : kBatch;
      for (int i = 0; i < here; ++i) {
        const std::int64_t from = block.shuffle(source, i) * rows.row_stride, to = block.shuffle(target, i) * rows.row_stride;
        switch (call.word) {
          case 16: copy<Bytes16>(block, rows, base, from, to); break;
          case 8: copy<std::uint64_t>(block, rows, base, from, to); break;
          case 4: copy<std::uint32_t>(block, rows, base, from, to); break;
          case 2: copy<std::uint16_t>(block, rows, base, from, to); break;
          default: copy<std::uint8_t>(block, rows, base, from, to);
        }
      }
    }
  }

  /// One row of all heads, by the lanes of a warp.
  template <class Word, class Block>
  static DYRATE_HD void copy(Block& block, const Rows& rows, char* base, std::int64_t from, std::int64_t to) {
    const int words = static_cast<int>(rows.row_bytes / static_cast<std::int64_t>(sizeof(Word)));
    const int heads_a_step = kWarp / words, words_a_step = kWarp % words;
    int head = block.lane() / words, word = block.lane() % words;
    while (head < rows.heads) {
      Word held[kInFlight];
      std::int64_t at[kInFlight];
      DYRATE_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        at[i] = head < rows.heads ? head * rows.head_stride + word * static_cast<std::int64_t>(sizeof(Word)) : -1;
        if (at[i] >= 0) held[i] = *reinterpret_cast<const Word*>(base + from + at[i]);
        head += heads_a_step;
        word += words_a_step;
        if (word >= words) {
          word -= words;
          ++head;
        }
      }
      DYRATE_UNROLL
      for (int i = 0; i < kInFlight; ++i) {
        if (at[i] >= 0) *reinterpret_cast<Word*>(base + to + at[i]) = held[i];
      }
    }
  }
};

/// See ReorderCall. A block holds the same words of all sequences: it reads them all, then writes them, so no second buffer is needed.
struct ReorderKernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  struct Shared {
    alignas(16) unsigned char tile[kMostReorderBatch * 16];
    int moved;
  };

  template <class Block>
  static DYRATE_HD void run(Block& block, Shared& shared, const ReorderCall& call) {
    if (block.thread() == 0) shared.moved = 0;
    block.sync();
    int mine = 0;
    for (int b = block.thread(); b < call.batch; b += kThreads) mine += call.index[b] != b;
    block.add_shared(&shared.moved, mine);
    block.sync();
    if (shared.moved == 0) return;
    const Rows& rows = call.rows[block.index().y];
    switch (call.word) {
      case 16: return move<Bytes16>(block, shared, call, rows);
      case 8: return move<std::uint64_t>(block, shared, call, rows);
      case 4: return move<std::uint32_t>(block, shared, call, rows);
      case 2: return move<std::uint16_t>(block, shared, call, rows);
      default: return move<std::uint8_t>(block, shared, call, rows);
    }
  }

  template <class Word, class Block>
  static DYRATE_HD void move(Block& block, Shared& shared, const ReorderCall& call, const Rows& rows) {
    Word* tile = reinterpret_cast<Word*>(shared.tile);
    const int width = kMostReorderBatch / call.batch;  // words of each sequence that a tile holds
    const std::int64_t words = rows.row_bytes / static_cast<std::int64_t>(sizeof(Word));
    for (std::int64_t start = block.index().x * static_cast<std::int64_t>(width); start < words;
         start += block.grid().x * static_cast<std::int64_t>(width)) {
      for (int i = block.thread(); i < call.batch * width; i += kThreads) {
        const std::int64_t b = i / width, word = start + i % width;
        if (word < words && call.index[b] != b) tile[i] = row(rows, call.index[b], static_cast<Word*>(nullptr))[word];
      }
      block.sync();
      for (int i = block.thread(); i < call.batch * width; i += kThreads) {
        const std::int64_t b = i / width, word = start + i % width;
        if (word < words && call.index[b] != b) row(rows, b, static_cast<Word*>(nullptr))[word] = tile[i];
      }  // no barrier: a thread reads back what it wrote to the tile, and the next words are others
    }
  }

  template <class Word>
  static DYRATE_HD Word* row(const Rows& rows, std::int64_t b, Word*) {
    return reinterpret_cast<Word*>(reinterpret_cast<char*>(rows.address) + b * rows.sequence_stride);
  }
};

}  // namespace dyrate
