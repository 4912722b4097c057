// The machine that the kernels are written for: a block of threads with barriers, warp shuffles and a "last block done" counter.
//
// A kernel is a struct with `kThreads`, `kBlocks` (blocks that a multiprocessor shall hold: bounds the registers), `kArchitecture` where it
// needs one (80: instructions.h), a plain struct `Shared` and
//     template <class Block> static DYRATE_HD void run(Block& block, Shared& shared, const Arguments& arguments);
// which names the thread, the warp and the block only through `block`. Compiled by nvcc, `DeviceBlock` maps that to the hardware;
// compiled with DYRATE_EMULATE by any C++17 compiler, `emulation/` runs the very same code on a CPU, one fiber a thread, in an
// order that a test chooses. `launch` starts a kernel in both.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef DYRATE_EMULATE
#define DYRATE_HD inline
#define DYRATE_UNROLL
#define DYRATE_UNROLL_BY(n)
#elif !defined(__CUDACC__)  // the binding: call structs and launchers, no kernels
#include <cuda_runtime_api.h>
#define DYRATE_HD
#else
#include <cuda_runtime.h>
#define DYRATE_HD __host__ __device__ __forceinline__
#define DYRATE_PRAGMA(text) _Pragma(#text)
#define DYRATE_UNROLL DYRATE_PRAGMA(unroll)
#define DYRATE_UNROLL_BY(n) DYRATE_PRAGMA(unroll n)
#endif

namespace dyrate {

constexpr int kWarp = 32;

/// 16 bytes as one load or store moves them.
struct alignas(16) Bytes16 {
  std::uint32_t word[4];
};

/// Blocks of a launch.
struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace dyrate

#ifdef DYRATE_EMULATE

#include "emulation/block.h"

#elif defined(__CUDACC__)

#include <atomic>

#include "instructions.h"

namespace dyrate {

/// The block that this thread is in, on the device.
struct DeviceBlock : DeviceInstructions {
  unsigned char* extra_memory;

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / kWarp; }
  __device__ __forceinline__ Grid index() const { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
  __device__ __forceinline__ Grid grid() const { return {gridDim.x, gridDim.y, gridDim.z}; }

  /// Shared memory beyond `Shared`, as many bytes as the launch asked for; starts at a multiple of 16.
  __device__ __forceinline__ unsigned char* extra() const { return extra_memory; }

  /// All threads of the block meet here; what they wrote before is seen after.
  __device__ __forceinline__ void sync() { __syncthreads(); }

  // The 32 lanes of a warp call these together.
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  template <class T>
  __device__ __forceinline__ T shuffle_up(T value, int distance) {
    return __shfl_up_sync(0xffffffffu, value, distance);
  }
  template <class T>
  __device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
  }
  __device__ __forceinline__ unsigned ballot(bool flag) { return __ballot_sync(0xffffffffu, flag); }

  /// Adds to an integer in shared memory; the order of additions does not matter to integers.
  __device__ __forceinline__ void add_shared(int* target, int value) { atomicAdd(target, value); }

  /// True in all threads of the block that is the last of `total` to come here; `*counter` counts them and is 0 again afterwards.
  /// What the other blocks wrote before they came is seen by the last one, through `load_shared_by_blocks`. All threads call it;
  /// `flag` is an int in shared memory.
  __device__ __forceinline__ bool last_of(unsigned* counter, unsigned total, int* flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *flag = atomicInc(counter, total - 1) == total - 1;
    __syncthreads();
    const bool last = *flag != 0;
    if (last) __threadfence();
    return last;
  }

  /// Loads what another block of this launch may have written: past the first-level cache.
  template <class T>
  __device__ __forceinline__ T load_shared_by_blocks(const T* address) {
    return __ldcg(address);
  }
  __device__ __forceinline__ std::uint32_t load4(const void* address) { return *static_cast<const std::uint32_t*>(address); }
  __device__ __forceinline__ Bytes16 load16(const void* address) {
    const uint4 got = *static_cast<const uint4*>(address);
    return {{got.x, got.y, got.z, got.w}};
  }
  __device__ __forceinline__ void store16(void* address, Bytes16 value) {
    *static_cast<uint4*>(address) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
  }
};

/// `Kernel::kArchitecture`, 0 where a kernel does not name one: below it its code is empty.
template <class Kernel, class = void>
constexpr int kArchitectureOf = 0;
template <class Kernel>
constexpr int kArchitectureOf<Kernel, decltype(void(Kernel::kArchitecture))> = Kernel::kArchitecture;

template <class Kernel, class Arguments>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks) entry(const __grid_constant__ Arguments arguments) {
#ifdef __CUDA_ARCH__
  if constexpr (kArchitectureOf<Kernel> * 10 <= __CUDA_ARCH__) {
    __shared__ typename Kernel::Shared shared;
    extern __shared__ uint4 extra[];
    DeviceBlock block;
    block.extra_memory = reinterpret_cast<unsigned char*>(extra);
    Kernel::run(block, shared, arguments);
  }
#endif
}

/// Lets `Kernel` have as much shared memory as a block may ask for on the current device; more than 48 KiB needs that. Asked once a device.
template <class Kernel, class Arguments>
cudaError_t allow_shared() {
  static std::atomic<std::uint64_t> allowed{0};
  int device = 0, most = 0;
  cudaError_t status = cudaGetDevice(&device);
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if (status != cudaSuccess || (allowed.load() & bit)) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  cudaFuncAttributes its;
  status = cudaFuncGetAttributes(&its, entry<Kernel, Arguments>);
  if (status != cudaSuccess) return status;
  most -= static_cast<int>(its.sharedSizeBytes);
  status = cudaFuncSetAttribute(entry<Kernel, Arguments>, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (status == cudaSuccess) allowed.fetch_or(bit);
  return status;
}

/// Starts `Kernel` on the caller's stream, with `extra` bytes of shared memory beyond its `Shared`. Allocates nothing, synchronises
/// nothing, can be captured in a graph.
template <class Kernel, class Arguments>
cudaError_t launch(Grid grid, cudaStream_t stream, const Arguments& arguments, int extra = 0) {
  if (extra > 0) {
    const cudaError_t status = allow_shared<Kernel, Arguments>();
    if (status != cudaSuccess) return status;
  }
  entry<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, static_cast<std::size_t>(extra), stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace dyrate

#endif
