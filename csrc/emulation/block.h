// The machine of simt.h on a CPU: each thread of a block is a fiber, all of them on one thread of the operating system.
//
// A fiber runs until it meets a barrier or a warp collective. Which one runs next is the setting `order`, so that a test can run the same
// kernel in several orders: a barrier that is missing shows as a result that depends on the order (or, compiled for it, in races.h).
// Several blocks are alive at once and take turns, so that blocks meet in every state of each other. Shared memory starts as NaN.
//
// Copies that threads do not wait for (instructions.h) land at the last moment that a machine may take, when they are waited for; in the
// order kDescending at once, in kRandom now and then at once. So what is read before its wait is old, and what is overwritten while others
// still read it shows too. What they read may not change while they are in flight.
//
// A launch fails with a message, and the process lives on, where threads of a block wait for something that the others do not come to:
// a barrier that is not reached by all, different barriers, a collective without all 32 lanes, bytes that nobody copies; and where a thread
// returns before its copies have landed. What is not seen: orders of memory weaker than a CPU's (a fence that is missing), and threads that
// spin.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

#ifdef DYRATE_EMULATE_RACES
#include "races.h"
#define DYRATE_RACES(statement) statement
#else
#define DYRATE_RACES(statement)
#endif

namespace dyrate {

class HostBlock;

namespace emulation {

constexpr int kLaunchFailed = 719;            // cudaErrorLaunchFailure
constexpr int kInvalidConfiguration = 9;      // cudaErrorInvalidConfiguration
constexpr std::size_t kMostShared = 48 << 10; // bytes of static shared memory of a block
constexpr std::size_t kMostArguments = 4096;  // bytes of kernel arguments
constexpr std::size_t kMostExchanged = 32;    // bytes of a shuffled value
constexpr std::size_t kMostExtra = 227 << 10; // bytes of shared memory of a block, with those that a launch asks for
constexpr int kPatience = 1000;               // turns that a thread waits for bytes

/// In which order threads and blocks go on; with kNothing launches start none, which leaves the time of the host.
enum Order : int { kAscending = 0, kDescending = 1, kRandom = 2, kNothing = 3 };

struct Settings {
  int order = kAscending;
  unsigned seed = 0;
  int resident_blocks = 4;
};

inline Settings& settings() {
  static Settings chosen;
  return chosen;
}

/// For all launches that follow. `seed` is that of the random order; each launch starts from it.
inline void configure(int order, unsigned seed, int resident_blocks) {
  settings().order = order < kAscending || order > kNothing ? kAscending : order;
  settings().seed = seed;
  settings().resident_blocks = resident_blocks < 1 ? 1 : resident_blocks;
}

inline std::string& message() {
  static std::string text;
  return text;
}

/// Why the last launch failed; empty if it did not.
inline const std::string& last_error() { return message(); }

/// A place in the kernel where threads wait for each other.
struct Site {
  const char* kind;
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(kind, other.kind) == 0 && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(kind) + " (" + (slash ? slash + 1 : file) + ":" + std::to_string(line) + ")";
  }
};

enum class State : std::uint8_t { kReady, kAtBarrier, kAtMeeting, kDone };

/// A copy in flight: `bytes` from one place, and zeros up to `room`.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, room;
  int group;                         // of the thread
  const void* barrier;               // that counts its bytes; null: the thread waits for the group
  std::vector<unsigned char> found;  // what the source held when the copy was started
};

/// An mbarrier.
struct ByteBarrier {
  int count = 0, missing = 0;  // arrivals of a phase; of this one, still to come
  std::int64_t bytes = 0;      // expected and not there
  unsigned phase = 0;          // phases that are over
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  State state = State::kDone;
  Site site{"", "", 0};
  unsigned meetings = 0;
  // What a lane brings to a collective. Two, in turn: whoever is at the next meeting has left this one, not so the one before.
  alignas(16) unsigned char brought[2][kMostExchanged];
  std::vector<Copy> copies;
  int groups = 0;  // of copies, closed
};

/// A block that is alive.
struct Resident {
  Grid index, grid;
  std::int64_t number = 0;  // of the launch
  int threads = 0;
  void* shared = nullptr;
  unsigned char* extra = nullptr;  // shared memory beyond the kernel's `Shared`
  std::vector<Copy> copies;        // that count at a barrier
  std::map<const void*, ByteBarrier> barrier;
  std::vector<Thread> thread;
  std::vector<int> met;  // lanes of each warp that wait at a collective
  int ready = 0, at_barrier = 0, done = 0;
  int phase = 0;  // barriers behind it
};

/// A kernel without its types.
struct Program {
  void (*run)(HostBlock&, void* shared, const void* arguments);
  const void* arguments;
  std::size_t argument_bytes;
  int threads;
  std::size_t shared_bytes, shared_alignment;  // with those beyond `Shared`
  std::size_t own_bytes;                       // where those start
};

/// Thrown to end a thread of a launch that has failed.
struct Ended {};

/// One launch at work.
class Machine {
 public:
  static Machine& only() {
    static Machine machine;
    return machine;
  }

  int run(Grid grid, const Program& program) {
    const std::lock_guard<std::mutex> alone(mutex_);
    message().clear();
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
      message() = "grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                  ": expected 1 .. 2147483647 x 1 .. 65535 x 1 .. 65535";
      return kInvalidConfiguration;
    }
    if (settings().order == kNothing) return 0;
    program_ = &program;
    random_ = settings().seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du;
    failed_ = false;
    const std::int64_t total = static_cast<std::int64_t>(grid.x) * grid.y * grid.z;
    order_blocks(total);
    std::size_t most = static_cast<std::size_t>(settings().resident_blocks);
    std::vector<Resident*> alive;
    std::int64_t started = 0;
    std::size_t turn = 0;
    DYRATE_RACES(races::begin(program.arguments, program.argument_bytes));
    while (!failed_ && (started < total || !alive.empty())) {
      while (started < total && alive.size() < most) alive.push_back(start(grid, place_in_order(started++, total), alive.size()));
      if (settings().order == kRandom) turn = draw(alive.size());
      if (turn >= alive.size()) turn = 0;
      Resident& block = *alive[turn];
      go_on(block);
      if (!failed_ && block.ready == 0) settle(block);
      if (!failed_ && block.done == block.threads) {
        if (!block.copies.empty()) fail(block, "all threads returned before copies have landed");
        retire(block);
        alive.erase(alive.begin() + static_cast<std::ptrdiff_t>(turn));
      } else {
        ++turn;
      }
    }
    for (Resident* block : alive) retire(*block);
    DYRATE_RACES(races::end());
    return failed_ ? kLaunchFailed : 0;
  }

  // ---- on fibers

  void wait_for_block(Resident& block, int thread, const Site& site) {
    ++block.at_barrier;
    wait(block, thread, State::kAtBarrier, site);
  }

  void wait_for_warp(Resident& block, int thread, const Site& site) {
    const int warp = thread / kWarp;
    if (++block.met[static_cast<std::size_t>(warp)] < kWarp) {
      wait(block, thread, State::kAtMeeting, site);
      return;
    }
    // The last lane to come: all may go on, in the order of the launch, so this one gives way like the others.
    block.met[static_cast<std::size_t>(warp)] = 0;
    DYRATE_RACES(if (std::strcmp(site.kind, "sync_warp") == 0) races::warp_barrier(block.number, warp));
    block.thread[static_cast<std::size_t>(thread)].site = site;
    for (int lane = 0; lane < kWarp; ++lane) {
      Thread& other = block.thread[static_cast<std::size_t>(warp * kWarp + lane)];
      if (!(other.site == site)) fail(block, "the lanes of warp " + std::to_string(warp) + " meet at different places: " + other.site.text() +
                                                 " and " + site.text());
      if (other.state == State::kAtMeeting) ++block.ready;
      other.state = State::kReady;
    }
    block.thread[static_cast<std::size_t>(thread)].fiber->give_way(false);
  }

  /// A copy that is started now lands at once.
  bool prompt() { return settings().order == kDescending || (settings().order == kRandom && draw(2) == 0); }

  void land(Resident& block, int thread, const Copy& copy) {
    if (!std::equal(copy.found.begin(), copy.found.end(), copy.from)) fail_thread(block, thread, "what a copy reads changed while it was in flight");
    std::copy_n(copy.from, copy.bytes, copy.to);
    std::memset(copy.to + copy.bytes, 0, static_cast<std::size_t>(copy.room - copy.bytes));
  }

  /// Another turn for the others of a thread that waits for bytes.
  void give_turn(Resident& block, int thread) { block.thread[static_cast<std::size_t>(thread)].fiber->give_way(false); }

  /// Ends the launch, from a fiber or the scheduler. The first message stays.
  void fail(const Resident& block, const std::string& why) {
    if (failed_) return;
    failed_ = true;
    message() = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " + std::to_string(block.index.z) +
                ") after " + std::to_string(block.phase) + " barriers: " + why;
  }

  /// As `fail`, and ends the thread.
  [[noreturn]] void fail_thread(Resident& block, int thread, const std::string& why) {
    fail(block, "thread " + std::to_string(thread) + ": " + why);
    throw Ended{};
  }

  bool failed() const { return failed_; }
  Resident* running() const { return running_; }
  int running_thread() const { return running_thread_; }

 private:
  void wait(Resident& block, int thread, State state, const Site& site) {
    Thread& self = block.thread[static_cast<std::size_t>(thread)];
    self.state = state;
    self.site = site;
    --block.ready;
    self.fiber->give_way(false);
  }

  static void entry();

  unsigned draw(std::size_t below) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<unsigned>((random_ >> 32) * below >> 32);
  }

  void order_blocks(std::int64_t total) {
    shuffled_.clear();
    if (settings().order != kRandom) return;
    for (std::int64_t i = 0; i < total; ++i) shuffled_.push_back(i);
    for (std::size_t i = shuffled_.size(); i > 1; --i) std::swap(shuffled_[i - 1], shuffled_[draw(i)]);
  }

  std::int64_t place_in_order(std::int64_t turn, std::int64_t total) const {
    if (settings().order == kRandom) return shuffled_[static_cast<std::size_t>(turn)];
    return settings().order == kDescending ? total - 1 - turn : turn;
  }

  Resident* start(Grid grid, std::int64_t number, std::size_t) {
    if (idle_.empty()) {
      made_.push_back(std::make_unique<Resident>());
      idle_.push_back(made_.back().get());
    }
    Resident& block = *idle_.back();
    idle_.pop_back();
    block.number = number;
    block.grid = grid;
    block.index.x = static_cast<unsigned>(number % grid.x);
    block.index.y = static_cast<unsigned>(number / grid.x % grid.y);
    block.index.z = static_cast<unsigned>(number / grid.x / grid.y);
    block.threads = block.ready = program_->threads;
    block.at_barrier = block.done = block.phase = 0;
    block.met.assign(static_cast<std::size_t>(block.threads / kWarp), 0);
    block.shared = ::operator new(program_->shared_bytes, std::align_val_t(program_->shared_alignment));
    std::memset(block.shared, 0xFF, program_->shared_bytes);
    block.extra = static_cast<unsigned char*>(block.shared) + program_->own_bytes;
    block.copies.clear();
    block.barrier.clear();
    if (block.thread.size() < static_cast<std::size_t>(block.threads)) block.thread.resize(static_cast<std::size_t>(block.threads));
    for (int t = 0; t < block.threads; ++t) {
      Thread& thread = block.thread[static_cast<std::size_t>(t)];
      if (!thread.fiber) thread.fiber = std::make_unique<Fiber>();
      thread.fiber->start(&Machine::entry, static_cast<unsigned>(t));
      thread.state = State::kReady;
      thread.meetings = 0;
      thread.copies.clear();
      thread.groups = 0;
    }
    DYRATE_RACES(races::start(block.number, block.shared, program_->shared_bytes));
    return &block;
  }

  void retire(Resident& block) {
    DYRATE_RACES(races::retire(block.number));
    ::operator delete(block.shared, std::align_val_t(program_->shared_alignment));
    block.shared = nullptr;
    idle_.push_back(&block);
  }

  /// Lets a block run: up to its next barrier, or in the random order one warp up to where its lanes wait.
  void go_on(Resident& block) {
    const int warps = block.threads / kWarp;
    if (settings().order == kRandom) {
      const int first = static_cast<int>(draw(static_cast<std::size_t>(warps)));
      for (int i = 0; i < warps; ++i) {
        if (pass(block, (first + i) % warps)) return;
      }
      return;
    }
    // A warp runs ahead as far as it can before the next one gets its turn: the furthest that a machine may let them drift apart.
    for (int i = 0; i < warps; ++i) {
      while (!failed_ && pass(block, settings().order == kDescending ? warps - 1 - i : i)) {
      }
    }
  }

  /// Each lane of a warp that can, goes on once. False if there was none.
  bool pass(Resident& block, int warp) {
    const unsigned flip = settings().order == kRandom ? draw(kWarp) : settings().order == kDescending ? kWarp - 1 : 0;
    const unsigned factor = settings().order == kRandom ? draw(kWarp / 2) * 2 + 1 : 1;  // odd: i * factor runs over all lanes
    bool any = false;
    for (unsigned i = 0; i < kWarp && !failed_; ++i) {
      const int number = warp * kWarp + static_cast<int>((i * factor ^ flip) % kWarp);
      Thread& thread = block.thread[static_cast<std::size_t>(number)];
      if (thread.state != State::kReady) continue;
      any = true;
      running_ = &block;
      running_thread_ = number;
      thread.fiber->resume();
      running_ = nullptr;
    }
    return any;
  }

  /// No thread of the block can go on: they are all done, or all at one barrier, or the launch fails.
  void settle(Resident& block) {
    if (block.done == block.threads) return;
    bool together = block.at_barrier == block.threads;
    for (int t = 1; t < block.threads && together; ++t) {
      together = block.thread[static_cast<std::size_t>(t)].site == block.thread[0].site;
    }
    if (!together) {
      fail(block, "threads wait for others that do not come: " + whereabouts(block));
      return;
    }
    for (int t = 0; t < block.threads; ++t) block.thread[static_cast<std::size_t>(t)].state = State::kReady;
    block.ready = block.threads;
    block.at_barrier = 0;
    ++block.phase;
    DYRATE_RACES(races::barrier(block.number));
  }

  /// "threads 0 .. 30: at sync (kernel.h:12); threads 31 .. 31: returned".
  static std::string whereabouts(const Resident& block) {
    std::string text;
    int first = 0, groups = 0;
    for (int t = 1; t <= block.threads; ++t) {
      const Thread& thread = block.thread[static_cast<std::size_t>(first)];
      if (t < block.threads) {
        const Thread& next = block.thread[static_cast<std::size_t>(t)];
        if (next.state == thread.state && (thread.state == State::kDone || next.site == thread.site)) continue;
      }
      if (++groups > 8) return text + "; ..";
      if (!text.empty()) text += "; ";
      text += "threads " + std::to_string(first) + " .. " + std::to_string(t - 1) + ": " +
              (thread.state == State::kDone ? std::string("returned") : "at " + thread.site.text());
      first = t;
    }
    return text;
  }

  std::mutex mutex_;
  const Program* program_ = nullptr;
  std::uint64_t random_ = 1;
  bool failed_ = false;
  std::vector<std::int64_t> shuffled_;
  std::vector<std::unique_ptr<Resident>> made_;
  std::vector<Resident*> idle_;
  Resident* running_ = nullptr;
  int running_thread_ = 0;
};

}  // namespace emulation

/// The members of DeviceBlock. Where a call stands in the source is part of it: that a barrier is the same one is a matter of that.
class HostBlock {
 public:
  HostBlock(emulation::Resident& block, int thread) : block_(&block), thread_(thread) {}

  int thread() const { return thread_; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  Grid index() const {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    return block_->index;
  }
  Grid grid() const {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    return block_->grid;
  }

  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::Machine::only().wait_for_block(*block_, thread_, {"sync", file, line});
  }

  template <class T>
  T shuffle_xor(T value, int mask, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    return exchange(value, lane() ^ mask, {"shuffle_xor", file, line});
  }
  template <class T>
  T shuffle_up(T value, int distance, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    return exchange(value, distance > lane() ? lane() : lane() - distance, {"shuffle_up", file, line});
  }
  template <class T>
  T shuffle(T value, int lane, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    return exchange(value, lane & (kWarp - 1), {"shuffle", file, line});
  }
  unsigned ballot(bool flag, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    const unsigned turn = bring(flag, {"ballot", file, line});
    unsigned votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) votes |= static_cast<unsigned>(brought<bool>(lane, turn)) << lane;
    return votes;
  }

  void add_shared(int* target, int value) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    DYRATE_RACES(emulation::races::access(target, sizeof *target, emulation::races::kAtomic, __builtin_return_address(0)));
    *target += value;
  }

  /// The counter wraps to 0 past `total - 1`, as atomicInc does.
  bool last_of(unsigned* counter, unsigned total, int* flag, const char* file = __builtin_FILE(),
                                int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::Machine& machine = emulation::Machine::only();
    machine.wait_for_block(*block_, thread_, {"last_of", file, line});
    if (thread_ == 0) {
      const unsigned before = *counter;
      *counter = before >= total - 1 ? 0 : before + 1;
      *flag = before == total - 1;
      DYRATE_RACES(emulation::races::access(flag, sizeof *flag, emulation::races::kWrite, __builtin_return_address(0)));
      DYRATE_RACES(emulation::races::arrive(block_->number, counter, *flag != 0));
    }
    machine.wait_for_block(*block_, thread_, {"last_of, second half", file, line});
    DYRATE_RACES(emulation::races::access(flag, sizeof *flag, emulation::races::kRead, __builtin_return_address(0)));
    return *flag != 0;
  }

  // ---- instructions.h

  using Place = unsigned char*;

  unsigned char* extra() const { return block_->extra; }
  template <class T>
  Place place(T* pointer) {
    return reinterpret_cast<unsigned char*>(pointer);
  }
  template <class T>
  T keep(T value) {
    return value;
  }
  Bytes16 load16_at(Place from) { return load16(from); }
  void clear16_at(Place to) { store16(to, Bytes16{{0, 0, 0, 0}}); }
  std::uint32_t load4_at(Place from) { return load4(from); }
  void store4_at(Place to, std::uint32_t word) {
    check_alignment(to, 4);
    *reinterpret_cast<std::uint32_t*>(to) = word;
  }

  void sync_warp(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    bring(0, {"sync_warp", file, line});
  }

  void copy16(Place to, const void* from, bool here, bool live = true) {
    if (!here) return;
    DYRATE_RACES(const emulation::races::Quiet quiet);
    check_alignment(to, 16);
    if (live) check_alignment(from, 16);
    static const unsigned char nothing[16] = {};
    emulation::Copy copy = started(to, live ? from : nothing, live ? 16 : 0, 16);
    DYRATE_RACES(emulation::races::access(to, 16, emulation::races::kWrite, __builtin_return_address(0)));
    DYRATE_RACES(if (live) emulation::races::access(from, 16, emulation::races::kRead, __builtin_return_address(0)));
    emulation::Thread& self = block_->thread[static_cast<std::size_t>(thread_)];
    copy.group = self.groups;
    if (emulation::Machine::only().prompt()) {
      emulation::Machine::only().land(*block_, thread_, copy);
    } else {
      self.copies.push_back(copy);
    }
  }
  void commit_copies() { ++block_->thread[static_cast<std::size_t>(thread_)].groups; }
  void wait_copies(int pending) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::Machine& machine = emulation::Machine::only();
    if (pending < 0 || pending > 2) machine.fail_thread(*block_, thread_, "waits for all copies but " + std::to_string(pending) + " groups");
    emulation::Thread& self = block_->thread[static_cast<std::size_t>(thread_)];
    std::vector<emulation::Copy> left;
    for (const emulation::Copy& copy : self.copies) {
      if (copy.group >= self.groups - pending) {
        left.push_back(copy);
        continue;
      }
      DYRATE_RACES(emulation::races::access(copy.to, 16, emulation::races::kWrite, __builtin_return_address(0)));
      machine.land(*block_, thread_, copy);
    }
    self.copies.swap(left);
  }

  void expect_arrivals(Place barrier, int count) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::ByteBarrier& made = block_->barrier[barrier];
    made = emulation::ByteBarrier();
    made.count = made.missing = count;
  }
  void expect_bytes(Place barrier, int bytes) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::ByteBarrier& its = known(barrier);
    if (--its.missing < 0) emulation::Machine::only().fail_thread(*block_, thread_, "arrives once too often at a barrier of bytes");
    its.bytes += bytes;
    settle(its);
  }
  void copy_bulk(Place to, const void* from, int bytes, Place barrier) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::Machine& machine = emulation::Machine::only();
    for (const void* address : {static_cast<const void*>(to), from}) check_alignment(address, 16);
    if (bytes <= 0 || bytes % 16) machine.fail_thread(*block_, thread_, "copies " + std::to_string(bytes) + " bytes: expected whole 16 bytes");
    emulation::Copy copy = started(to, from, bytes, bytes);
    DYRATE_RACES(emulation::races::copy(to, from, static_cast<std::size_t>(bytes), __builtin_return_address(0)));
    copy.barrier = barrier;
    if (machine.prompt()) {
      deliver(copy);
    } else {
      block_->copies.push_back(copy);
    }
  }
  void wait_bytes(Place barrier, int parity) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    emulation::Machine& machine = emulation::Machine::only();
    for (int turn = 0; (known(barrier).phase & 1u) == static_cast<unsigned>(parity); ++turn) {
      if (turn == emulation::kPatience) machine.fail_thread(*block_, thread_, "waits for bytes that nobody copies");
      if (turn) machine.give_turn(*block_, thread_);
      std::vector<emulation::Copy> all;
      all.swap(block_->copies);
      for (const emulation::Copy& copy : all) {
        if (copy.barrier == barrier) {
          deliver(copy);
        } else {
          block_->copies.push_back(copy);
        }
      }
    }
  }
  void fence_proxy() { DYRATE_RACES(emulation::races::fence(block_->number, thread_)); }

  template <bool kTransposed>
  void load_matrices(std::uint32_t (&out)[4], Place row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    check_alignment(row, 16);
    const unsigned turn = bring(row, {"load_matrices", file, line});
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t half[2];
      for (int i = 0; i < 2; ++i) {
        const int at = kTransposed ? 2 * (lane() % 4) + i : lane() / 4, column = kTransposed ? lane() / 4 : 2 * (lane() % 4) + i;
        const std::uint16_t* its = static_cast<const std::uint16_t*>(brought<const void*>(8 * matrix + at, turn)) + column;
        DYRATE_RACES(emulation::races::access(its, sizeof *its, emulation::races::kRead, __builtin_return_address(0)));
        std::memcpy(&half[i], its, sizeof *its);
      }
      out[matrix] = half[0] | static_cast<std::uint32_t>(half[1]) << 16;
    }
  }
  std::uint32_t transpose_matrix(std::uint32_t pair, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    const unsigned turn = bring(pair, {"transpose_matrix", file, line});
    std::uint32_t out = 0;
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * (lane() % 4) + i, column = lane() / 4;
      const std::uint32_t word = brought<std::uint32_t>(4 * row + column / 2, turn);
      out |= (word >> 16 * (column % 2) & 0xFFFFu) << 16 * i;
    }
    return out;
  }
  template <class Element>
  void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const char* file = __builtin_FILE(),
                int line = __builtin_LINE()) {
    DYRATE_RACES(const emulation::races::Quiet quiet);
    struct Fragments {
      std::uint32_t a[4], b[2];
    };
    const unsigned turn = bring(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, {"multiply", file, line});
    const auto number = [](std::uint32_t word, int half) { return to_float(Element{static_cast<std::uint16_t>(word >> 16 * half)}); };
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4, column = 2 * (lane() % 4) + i % 2, below = i / 2;  // below: row + 8
      for (int k = 0; k < 16; ++k) {
        const Fragments left = brought<Fragments>(4 * row + k % 8 / 2, turn), right = brought<Fragments>(4 * column + k % 8 / 2, turn);
        c[i] += number(left.a[k / 8 * 2 + below], k % 2) * number(right.b[k / 8], k % 2);
      }
    }
  }
  float power(float x) { return exp2f(x); }
  template <class Element>
  std::uint32_t pack(float low, float high) {
    Element pair[2];
    from_float(low, &pair[0]);
    from_float(high, &pair[1]);
    return pair[0].bits | static_cast<std::uint32_t>(pair[1].bits) << 16;
  }

  template <class T>
  T load_shared_by_blocks(const T* address) {
    check_alignment(address, alignof(T));
    return *address;
  }
  std::uint32_t load4(const void* address) {
    check_alignment(address, 4);
    return *static_cast<const std::uint32_t*>(address);
  }
  Bytes16 load16(const void* address) {
    check_alignment(address, 16);
    return *static_cast<const Bytes16*>(address);
  }
  void store16(void* address, Bytes16 value) {
    check_alignment(address, 16);
    *static_cast<Bytes16*>(address) = value;
  }

 private:
  static emulation::Copy started(void* to, const void* from, int bytes, int room) {
    const unsigned char* source = static_cast<const unsigned char*>(from);
    return {static_cast<unsigned char*>(to), source, bytes, room, 0, nullptr, std::vector<unsigned char>(source, source + bytes)};
  }
  emulation::ByteBarrier& known(const void* barrier) {
    const auto found = block_->barrier.find(barrier);
    if (found == block_->barrier.end()) emulation::Machine::only().fail_thread(*block_, thread_, "uses a barrier of bytes that nobody made");
    return found->second;
  }
  static void settle(emulation::ByteBarrier& barrier) {
    if (barrier.missing || barrier.bytes) return;
    barrier.missing = barrier.count;
    ++barrier.phase;
  }
  void deliver(const emulation::Copy& copy) {
    emulation::Machine::only().land(*block_, thread_, copy);
    emulation::ByteBarrier& barrier = known(copy.barrier);
    barrier.bytes -= copy.bytes;
    settle(barrier);
  }

  void check_alignment(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes == 0) return;
    emulation::Machine::only().fail_thread(
        *block_, thread_,
        "address " + std::to_string(reinterpret_cast<std::uintptr_t>(address)) + " is not a multiple of " + std::to_string(bytes));
  }

  /// Leaves a value for the warp and waits for the other lanes; returns which of the two places it lies in.
  template <class T>
  unsigned bring(T value, const emulation::Site& site) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= emulation::kMostExchanged, "lanes exchange plain values");
    emulation::Thread& self = block_->thread[static_cast<std::size_t>(thread_)];
    const unsigned turn = self.meetings++ % 2;
    std::memcpy(self.brought[turn], &value, sizeof value);
    emulation::Machine::only().wait_for_warp(*block_, thread_, site);
    return turn;
  }

  template <class T>
  T brought(int lane, unsigned turn) const {
    T value;
    std::memcpy(&value, block_->thread[static_cast<std::size_t>(warp() * kWarp + lane)].brought[turn], sizeof value);
    return value;
  }

  template <class T>
  T exchange(T value, int from, const emulation::Site& site) {
    const unsigned turn = bring(value, site);
    if (from < 0 || from >= kWarp) {
      emulation::Machine::only().fail_thread(*block_, thread_, site.text() + " asks for lane " + std::to_string(from) + " of 32");
    }
    return brought<T>(from, turn);
  }

  emulation::Resident* block_;
  int thread_;
};

namespace emulation {

inline void Machine::entry() {
  Machine& machine = only();
  Resident& block = *machine.running_;
  const int number = machine.running_thread_;
  Thread& self = block.thread[static_cast<std::size_t>(number)];
  self.fiber->arrived();
  DYRATE_RACES(races::hush(false));
  try {
    HostBlock view(block, number);
    machine.program_->run(view, block.shared, machine.program_->arguments);
    if (!self.copies.empty()) machine.fail(block, "thread " + std::to_string(number) + ": returns before its copies have landed");
  } catch (const Ended&) {
  } catch (const std::exception& error) {
    machine.fail(block, "thread " + std::to_string(number) + " throws: " + error.what());
  }
  DYRATE_RACES(races::hush(true));
  self.state = State::kDone;
  --block.ready;
  ++block.done;
  self.fiber->give_way(true);
}

}  // namespace emulation

/// Runs `Kernel` to its end, with `extra` bytes of shared memory beyond its `Shared`. 0, or a status with `emulation::last_error()`.
template <class Kernel, class Arguments>
int launch(Grid grid, void*, const Arguments& arguments, int extra = 0) {
  using Shared = typename Kernel::Shared;
  static_assert(Kernel::kThreads > 0 && Kernel::kThreads % kWarp == 0 && Kernel::kThreads <= 1024, "a block is 1 .. 32 whole warps");
  static_assert(std::is_trivially_copyable<Shared>::value && std::is_trivially_default_constructible<Shared>::value,
                "shared memory holds plain data, which nobody constructs");
  static_assert(sizeof(Shared) <= emulation::kMostShared, "static shared memory of a block is 48 KiB at most");
  static_assert(std::is_trivially_copyable<Arguments>::value && sizeof(Arguments) <= emulation::kMostArguments,
                "arguments travel by value in 4 KiB");
  const Arguments copy = arguments;
  const std::size_t own = (sizeof(Shared) + 15) / 16 * 16, bytes = own + static_cast<std::size_t>(extra);
  if (extra < 0 || bytes > emulation::kMostExtra) {
    emulation::message() = std::to_string(bytes) + " bytes of shared memory: a block has " + std::to_string(emulation::kMostExtra) + " at most";
    return emulation::kInvalidConfiguration;
  }
  const emulation::Program program{
      [](HostBlock& block, void* shared, const void* given) {
        Kernel::run(block, *static_cast<Shared*>(shared), *static_cast<const Arguments*>(given));
      },
      &copy, sizeof copy, Kernel::kThreads, bytes, alignof(Shared) < 16 ? 16 : alignof(Shared), own};
  return emulation::Machine::only().run(grid, program);
}

}  // namespace dyrate
