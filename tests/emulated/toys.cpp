// Toy kernels, one for each thing that the emulation has to do or to notice. `toys` prints "name: what happened", a line each;
// test_emulation.py says what must happen. `toys NAME` runs one of them alone.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "simt.h"

using dyrate::Grid;
using dyrate::kWarp;

namespace {

struct Arguments {
  int* out;
  unsigned* counter;
  int n;
};

// ---- kernels that are right

/// Every block sums 0 .. n-1 with shuffles and shared memory; the last one adds up the blocks.
struct SumKernel {
  static constexpr int kThreads = 128;
  struct Shared {
    int part[kThreads / kWarp];
    int flag;
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    int sum = 0;
    for (int i = block.thread(); i < call.n; i += kThreads) sum += i;
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += block.shuffle_xor(sum, distance);
    if (block.lane() == 0) shared.part[block.warp()] = sum;
    block.sync();
    if (block.thread() == 0) {
      int total = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) total += shared.part[warp];
      call.out[1 + block.index().x] = total;
    }
    if (!block.last_of(call.counter, block.grid().x, &shared.flag)) return;
    if (block.thread() == 0) {
      int total = 0;
      for (unsigned other = 0; other < block.grid().x; ++other) total += block.load_shared_by_blocks(call.out + 1 + other);
      call.out[0] = total;
    }
  }
};

/// All collectives against what they must give.
struct CollectiveKernel {
  static constexpr int kThreads = 64;
  struct Shared {
    int count;
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    const int lane = block.lane(), thread = block.thread();
    if (thread == 0) shared.count = 0;
    block.sync();
    bool good = block.shuffle_xor(thread, 5) == (thread ^ 5);
    good = good && block.shuffle_up(thread, 3) == (lane < 3 ? thread : thread - 3);
    good = good && block.shuffle(thread, (lane * 7) % kWarp) == block.warp() * kWarp + (lane * 7) % kWarp;
    good = good && block.shuffle(static_cast<double>(thread), 2) == block.warp() * kWarp + 2;
    good = good && block.ballot(lane % 3 == 0) == 0x49249249u;
    if (good) block.add_shared(&shared.count, 1);
    block.sync();
    if (thread == 0) *call.out = shared.count;
  }
};

struct IndexKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments& call) {
    const Grid at = block.index(), grid = block.grid();
    if (block.thread() == 0) call.out[(at.z * grid.y + at.y) * grid.x + at.x] = static_cast<int>(at.x + 10 * at.y + 100 * at.z);
  }
};

// ---- kernels whose result depends on the order

struct NoBarrierBeforeReadKernel {
  static constexpr int kThreads = 64;
  struct Shared {
    int value[kThreads];
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    const int thread = block.thread();
    shared.value[thread] = thread + 1;
    call.out[thread] = shared.value[(thread + 1) % kThreads];  // the neighbour's
  }
};

struct NoBarrierBeforeOverwriteKernel {
  static constexpr int kThreads = 64;
  struct Shared {
    int value[kThreads];
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    const int thread = block.thread();
    shared.value[thread] = thread + 1;
    block.sync();
    call.out[thread] = shared.value[kThreads - 1 - thread];
    shared.value[thread] = -1;
  }
};

/// A shuffle is no barrier: what lanes left in shared memory may not be read after it.
struct ShuffleIsNoBarrierKernel {
  static constexpr int kThreads = 32;
  struct Shared {
    int value[kThreads];
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    shared.value[block.lane()] = block.lane();
    block.shuffle(0, 0);
    call.out[block.lane()] = shared.value[kWarp - 1 - block.lane()];
  }
};

/// The last block in the grid takes itself for the last one to finish.
struct LastByIndexKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments& call) {
    const unsigned x = block.index().x, blocks = block.grid().x;
    if (block.thread() == 0) call.out[1 + x] = static_cast<int>(x) + 1;
    block.sync();
    if (x != blocks - 1 || block.thread() != 0) return;
    int total = 0;
    for (unsigned other = 0; other < blocks; ++other) total += call.out[1 + other];
    call.out[0] = total;
  }
};

/// Counts before all threads of the block have written.
struct EarlyCountKernel {
  static constexpr int kThreads = 64;
  struct Shared {
    int flag;
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    const bool last = block.last_of(call.counter, block.grid().x, &shared.flag);
    if (block.thread() == 40) call.out[1 + block.index().x] = 1;
    if (!last) return;
    block.sync();
    if (block.thread() != 0) return;
    int total = 0;
    for (unsigned other = 0; other < block.grid().x; ++other) total += block.load_shared_by_blocks(call.out + 1 + other);
    call.out[0] = total;
  }
};

struct UnsetSharedKernel {
  static constexpr int kThreads = 32;
  struct Shared {
    int sum;
    float real;
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    if (block.thread() == 0) {
      call.out[0] = shared.sum;
      call.out[1] = shared.real != shared.real;
    }
  }
};

// ---- kernels that must fail

struct OneThreadLeavesKernel {
  static constexpr int kThreads = 64;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    if (block.thread() == 37) return;
    block.sync();
  }
};

struct TwoBarriersKernel {
  static constexpr int kThreads = 64;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    if (block.warp() == 0) {
      block.sync();
    } else {
      block.sync();
    }
  }
};

struct HalfWarpShufflesKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    if (block.lane() < 16) block.shuffle_xor(1, 8);
  }
};

struct TwoCollectivesKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    if (block.lane() < 16) {
      block.shuffle_xor(1, 8);
    } else {
      block.ballot(true);
    }
  }
};

struct ShuffleAgainstBarrierKernel {
  static constexpr int kThreads = 64;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    if (block.thread() == 3) {
      block.sync();
    } else {
      block.shuffle(1, 0);
    }
  }
};

struct WrongLaneKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments&) {
    block.shuffle_xor(1, 32);
  }
};

struct MisalignedKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments& call) {
    block.store16(call.out + 1, block.load16(call.out));
  }
};

/// For sanitizers: one past the end of shared memory, of an array in it, of global memory.
struct BeyondSharedKernel {
  static constexpr int kThreads = 32;
  struct Shared {
    int value[kThreads];
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    int* value = shared.value;
    value[block.thread() + call.n] = 1;
  }
};

struct BeyondArrayKernel {
  static constexpr int kThreads = 32;
  struct Shared {
    int value[kThreads], more[kThreads];
  };
  template <class Block>
  static void run(Block& block, Shared& shared, const Arguments& call) {
    shared.value[block.thread() + call.n] = 1;
  }
};

struct BeyondGlobalKernel {
  static constexpr int kThreads = 32;
  struct Shared {};
  template <class Block>
  static void run(Block& block, Shared&, const Arguments& call) {
    call.out[call.n + block.thread()] = 1;
  }
};

// ---- running them

constexpr int kMost = 512;

struct Outcome {
  int status;
  std::string error;
  std::vector<int> out;
  unsigned counter;
};

template <class Kernel>
Outcome once(Grid grid, int n, int order, unsigned seed, int resident) {
  dyrate::emulation::configure(order, seed, resident);
  Outcome outcome;
  std::vector<int> out(kMost, -7);
  alignas(16) unsigned counter = 0;
  outcome.status = dyrate::launch<Kernel>(grid, nullptr, Arguments{out.data(), &counter, n});
  outcome.error = dyrate::emulation::last_error();
  outcome.out = out;
  outcome.counter = counter;
  return outcome;
}

/// Every order and number of blocks: "fails: why", "order matters", or "same: the first numbers".
template <class Kernel>
void all_orders(const char* name, Grid grid = {}, int n = 100) {
  std::vector<Outcome> seen;
  for (int resident : {1, 3, 100}) {
    for (int order = 0; order < 3; ++order) {
      for (unsigned seed = 0; seed < (order == 2 ? 4u : 1u); ++seed) seen.push_back(once<Kernel>(grid, n, order, seed, resident));
    }
  }
  std::string text;
  int failed = 0;
  for (const Outcome& outcome : seen) failed += outcome.status != 0;
  if (failed == static_cast<int>(seen.size())) {
    text = "fails: " + seen[0].error;
  } else if (failed) {
    text = "fails sometimes";
  } else {
    bool same = true, zero = true;
    for (const Outcome& outcome : seen) {
      same = same && outcome.out == seen[0].out;
      zero = zero && outcome.counter == 0;
    }
    text = same ? "same: " + std::to_string(seen[0].out[0]) + " " + std::to_string(seen[0].out[1]) : "order matters";
    if (!zero) text += ", counter left behind";
  }
  std::printf("%s: %s\n", name, text.c_str());
}

void indices() {
  bool good = true;
  for (int order = 0; order < 3; ++order) {
    const Outcome outcome = once<IndexKernel>({5, 4, 3}, 0, order, 1, 4);
    for (int z = 0; z < 3; ++z) {
      for (int y = 0; y < 4; ++y) {
        for (int x = 0; x < 5; ++x) good = good && outcome.out[static_cast<std::size_t>((z * 4 + y) * 5 + x)] == x + 10 * y + 100 * z;
      }
    }
  }
  std::printf("index: %s\n", good ? "right" : "wrong");
}

void empty_grid() {
  const Outcome outcome = once<IndexKernel>({5, 0, 3}, 0, 0, 0, 1);
  std::printf("empty grid: %s\n", outcome.status == 0 ? "runs" : ("fails: " + outcome.error).c_str());
}

void recovers() {
  const bool fails = once<OneThreadLeavesKernel>({7, 1, 1}, 0, 2, 3, 4).status != 0;
  const Outcome after = once<SumKernel>({7, 1, 1}, 100, 2, 3, 4);
  std::printf("after a failure: %s\n", fails && after.status == 0 && after.error.empty() && after.out[0] == 7 * 4950 ? "right" : "wrong");
}

void sanitized(const char* name) {
  const std::string which = name;
  Outcome outcome{};
  if (which == "beyond shared") outcome = once<BeyondSharedKernel>({}, 1, 0, 0, 1);
  if (which == "beyond array") outcome = once<BeyondArrayKernel>({}, 1, 0, 0, 1);
  if (which == "beyond global") outcome = once<BeyondGlobalKernel>({}, kMost - 31, 0, 0, 1);
  std::printf("%s: not noticed, %d\n", name, outcome.status);
}

}  // namespace

int main(int count, char** names) {
  if (count > 1) {
    sanitized(names[1]);
    return 0;
  }
  indices();
  empty_grid();
  recovers();
  all_orders<SumKernel>("sum", {9, 1, 1}, 1000);
  all_orders<CollectiveKernel>("collectives");
  all_orders<UnsetSharedKernel>("unset shared memory");
  all_orders<NoBarrierBeforeReadKernel>("no barrier before read");
  all_orders<NoBarrierBeforeOverwriteKernel>("no barrier before overwrite");
  all_orders<ShuffleIsNoBarrierKernel>("shuffle is no barrier");
  all_orders<LastByIndexKernel>("last by index", {6, 1, 1});
  all_orders<EarlyCountKernel>("early count", {6, 1, 1});
  all_orders<OneThreadLeavesKernel>("one thread leaves");
  all_orders<TwoBarriersKernel>("two barriers");
  all_orders<HalfWarpShufflesKernel>("half a warp shuffles");
  all_orders<TwoCollectivesKernel>("two collectives");
  all_orders<ShuffleAgainstBarrierKernel>("shuffle against barrier");
  all_orders<WrongLaneKernel>("wrong lane");
  all_orders<MisalignedKernel>("misaligned");
  return 0;
}
