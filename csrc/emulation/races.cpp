// The functions that -fsanitize=thread makes the compiler call, and what they find out. See races.h. Compiled without that option.
#include "races.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../simt.h"

namespace dyrate::emulation::races {
namespace {

/// Who touched a byte, and when: after `phase` barriers of its block, `warp_phase` of its warp, `fences` of its own.
struct Touch {
  std::int32_t block = -1;
  std::int16_t thread = 0;
  bool atomic = false;
  bool bulk = false;
  std::int32_t phase = 0, warp_phase = 0, fences = 0;
  const void* code = nullptr;
};

struct Cell {
  Touch write, read, other_read;  // two reads of different threads: whoever writes conflicts with one of them
};

constexpr std::uintptr_t kPage = 1024;

struct Page {
  Cell cell[kPage];
};

struct Known {
  const char* shared = nullptr;
  std::size_t bytes = 0;
  std::vector<Cell> cell;                              // of shared memory
  std::int32_t phase = 0;
  std::int32_t warp_phase[32] = {}, fences[1024] = {};
  std::unordered_map<std::int64_t, std::int32_t> seen;  // of another block: the barriers that all it did is visible up to
};

struct All {
  std::unordered_map<std::int64_t, Known> block;
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> page;
  std::unordered_map<const unsigned*, std::unordered_map<std::int64_t, std::int32_t>> counter;
  const char* arguments = nullptr;
  std::size_t argument_bytes = 0;
  std::int64_t at_block = -1;  // that was asked for last
  Known* at = nullptr;
  std::uintptr_t at_page = 0;
  Page* page_there = nullptr;
  bool quiet = true;
};

All& all() {
  static All state;
  return state;
}

void merge(std::unordered_map<std::int64_t, std::int32_t>& into, const std::unordered_map<std::int64_t, std::int32_t>& from) {
  for (const auto& [block, phase] : from) {
    std::int32_t& known = into[block];
    if (phase > known) known = phase;
  }
}

/// Nothing orders the earlier touch before what `now` does.
bool concurrent(const Known& block, const Touch& earlier, const Touch& now) {
  if (earlier.block < 0 || (earlier.atomic && now.atomic)) return false;
  if (earlier.block == now.block) {
    if (earlier.thread == now.thread || earlier.phase != now.phase) return false;
    return earlier.thread / kWarp != now.thread / kWarp || earlier.warp_phase == now.warp_phase;
  }
  const auto seen = block.seen.find(earlier.block);
  return seen == block.seen.end() || earlier.phase >= seen->second;
}

/// "libkernel.so+0x1234", which addr2line understands.
std::string place(const void* code) {
  Dl_info found;
  if (dladdr(code, &found) == 0 || found.dli_fname == nullptr) return "unknown";
  char offset[32];
  std::snprintf(offset, sizeof offset, "+0x%zx",
                static_cast<std::size_t>(static_cast<const char*>(code) - static_cast<const char*>(found.dli_fbase)) - 1);
  return found.dli_fname + std::string(offset);
}

std::string describe(const Touch& touch, const char* what) {
  return std::string("thread ") + std::to_string(touch.thread) + " of block number " + std::to_string(touch.block) + " " + what + " at " +
         place(touch.code);
}

void report(const Resident& resident, const char* memory, std::size_t offset, const Touch& earlier, const char* did, const Touch& now,
            const char* does) {
  Machine::only().fail(resident, "race on byte " + std::to_string(offset) + " of " + memory + " memory: " + describe(earlier, did) +
                                     ", " + describe(now, does) + ", and no barrier between them");
}

void touch(const Resident& resident, Known& block, Cell& cell, const Touch& now, Kind kind, const char* memory, std::size_t offset) {
  if (concurrent(block, cell.write, now)) {
    report(resident, memory, offset, cell.write, "writes", now, kind == kRead ? "reads" : "writes");
    return;
  }
  if (kind == kRead) {
    const bool mine = cell.read.block == now.block && cell.read.thread == now.thread;
    (mine || !concurrent(block, cell.read, now) ? cell.read : cell.other_read) = now;
    return;
  }
  for (const Touch* read : {&cell.read, &cell.other_read}) {
    if (!concurrent(block, *read, now)) continue;
    report(resident, memory, offset, *read, "reads", now, "writes");
    return;
  }
  cell.write = now;
}

}  // namespace

void begin(const void* arguments, std::size_t bytes) {
  end();
  all().arguments = static_cast<const char*>(arguments);
  all().argument_bytes = bytes;
}

void end() {
  All& state = all();
  state.block.clear();
  state.page.clear();
  state.counter.clear();
  state.at_block = -1;
  state.at = nullptr;
  state.page_there = nullptr;
  state.quiet = true;
}

void start(std::int64_t block, const void* shared, std::size_t bytes) {
  Known& known = all().block[block];
  known.shared = static_cast<const char*>(shared);
  known.bytes = bytes;
  known.cell.assign(bytes, Cell());
}

void retire(std::int64_t block) {
  all().block.erase(block);
  all().at_block = -1;
}

void barrier(std::int64_t block) { ++all().block[block].phase; }

void warp_barrier(std::int64_t block, int warp) { ++all().block[block].warp_phase[warp]; }

void fence(std::int64_t block, int thread) { ++all().block[block].fences[thread]; }

void arrive(std::int64_t block, const unsigned* counter, bool last) {
  Known& known = all().block[block];
  auto& arrived = all().counter[counter];
  merge(arrived, known.seen);
  arrived[block] = known.phase;
  if (!last) return;
  merge(known.seen, arrived);
  all().counter.erase(counter);
}

void hush(bool quiet) { all().quiet = quiet; }

namespace {

/// `bulk`: by a copy that the thread starts.
void access(const void* address, std::size_t bytes, Kind kind, const void* code, bool bulk) {
  Machine& machine = Machine::only();
  const Resident* resident = machine.running();
  if (resident == nullptr || machine.failed()) return;
  All& state = all();
  const int thread = machine.running_thread();
  const char* first = static_cast<const char*>(address);
  if (resident->thread[static_cast<std::size_t>(thread)].fiber->holds(first)) return;
  if (first >= state.arguments && first < state.arguments + state.argument_bytes) return;
  if (state.at_block != resident->number) {
    state.at_block = resident->number;
    state.at = &state.block[resident->number];
  }
  Known& block = *state.at;
  const Touch now{static_cast<std::int32_t>(resident->number), static_cast<std::int16_t>(thread), kind == kAtomic, bulk, block.phase,
                  block.warp_phase[thread / kWarp], block.fences[thread], code};
  const auto behind_fence = [&](const Cell& cell, const char* memory, std::size_t offset) {
    const Touch& write = cell.write;
    if (!bulk || write.bulk || write.block != now.block || block.fences[write.thread] > write.fences) return;
    machine.fail(*resident, "no fence_proxy on byte " + std::to_string(offset) + " of " + memory + " memory between what " +
                                describe(write, "writes") + " and the copy that " + describe(now, "starts"));
  };
  if (first >= block.shared && first < block.shared + block.bytes) {
    const std::size_t offset = static_cast<std::size_t>(first - block.shared);
    for (std::size_t i = offset; i < offset + bytes && i < block.bytes; ++i) {
      behind_fence(block.cell[i], "shared", i);
      touch(*resident, block, block.cell[i], now, kind, "shared", i);
    }
    return;
  }
  for (std::uintptr_t at = reinterpret_cast<std::uintptr_t>(first), past = at + bytes; at < past; ++at) {
    if (state.page_there == nullptr || state.at_page != at / kPage) {
      std::unique_ptr<Page>& page = state.page[at / kPage];
      if (!page) page = std::make_unique<Page>();
      state.at_page = at / kPage;
      state.page_there = page.get();
    }
    behind_fence(state.page_there->cell[at % kPage], "global", at);
    touch(*resident, block, state.page_there->cell[at % kPage], now, kind, "global", at);
  }
}

}  // namespace

void access(const void* address, std::size_t bytes, Kind kind, const void* code) { access(address, bytes, kind, code, false); }

void copy(const void* to, const void* from, std::size_t bytes, const void* code) {
  access(from, bytes, kRead, code, true);
  access(to, bytes, kWrite, code, true);
}

namespace {

void hook(const void* address, std::size_t bytes, Kind kind, const void* code) {
  bool& quiet = all().quiet;
  if (quiet) return;
  quiet = true;  // what access calls may be a copy that is compiled like the kernels
  access(address, bytes, kind, code);
  quiet = false;
}

}  // namespace

}  // namespace dyrate::emulation::races

namespace races = dyrate::emulation::races;

// The names that the compiler uses.
#define DYRATE_HOOK(name, bytes, kind) \
  void name(void* address) { races::hook(address, bytes, kind, __builtin_return_address(0)); }
#define DYRATE_HOOKS(bytes)                                          \
  DYRATE_HOOK(__tsan_read##bytes, bytes, races::kRead)               \
  DYRATE_HOOK(__tsan_write##bytes, bytes, races::kWrite)             \
  DYRATE_HOOK(__tsan_unaligned_read##bytes, bytes, races::kRead)     \
  DYRATE_HOOK(__tsan_unaligned_write##bytes, bytes, races::kWrite)   \
  DYRATE_HOOK(__tsan_volatile_read##bytes, bytes, races::kRead)      \
  DYRATE_HOOK(__tsan_volatile_write##bytes, bytes, races::kWrite)

extern "C" {
DYRATE_HOOKS(1)
DYRATE_HOOKS(2)
DYRATE_HOOKS(4)
DYRATE_HOOKS(8)
DYRATE_HOOKS(16)
void __tsan_read_range(void* address, std::size_t bytes) { races::hook(address, bytes, races::kRead, __builtin_return_address(0)); }
void __tsan_write_range(void* address, std::size_t bytes) { races::hook(address, bytes, races::kWrite, __builtin_return_address(0)); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
// Guards of local statics; a kernel has no other atomics than those of its block.
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) { return __atomic_load_n(address, __ATOMIC_SEQ_CST); }
}
