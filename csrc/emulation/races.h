// A detector of races for the emulation: which accesses to memory have no barrier between them, whatever order they happened in.
//
// The kernels are compiled with -fsanitize=thread -DDYRATE_EMULATE_RACES, so that the compiler calls a function at every access to memory,
// and linked without that library: races.cpp has these functions. Each byte remembers who wrote and read it last and after how many
// barriers of its block and its warp (`sync_warp`). Two threads of a block race where no barrier came between them; two blocks do unless the
// one has come to a `last_of` counter afterwards and the other was the last to come there. Shuffles and votes order nothing, as in CUDA.
// A copy that nobody waits for writes when it is started and when it is waited for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dyrate::emulation::races {

enum Kind : int { kRead, kWrite, kAtomic };

void begin(const void* arguments, std::size_t bytes);  // of a launch; its arguments are nobody's to write
void end();
void start(std::int64_t block, const void* shared, std::size_t bytes);
void retire(std::int64_t block);
void barrier(std::int64_t block);
void warp_barrier(std::int64_t block, int warp);
void fence(std::int64_t block, int thread);
/// A bulk copy is started: it writes and reads like the running thread, but past its fences. What a thread wrote itself and did not fence
/// since is not there for it.
void copy(const void* to, const void* from, std::size_t bytes, const void* code);
void arrive(std::int64_t block, const unsigned* counter, bool last);
void access(const void* address, std::size_t bytes, Kind kind, const void* code);
void hush(bool quiet);

/// While it lives, accesses are those of the machinery and not the kernel's.
struct Quiet {
  Quiet() { hush(true); }
  ~Quiet() { hush(false); }
  Quiet(const Quiet&) = delete;
};

}  // namespace dyrate::emulation::races
