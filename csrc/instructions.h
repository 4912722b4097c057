// What sm_80 and sm_90 add to the machine of simt.h: copies to shared memory that threads do not wait for, and tensor cores.
//
// Base of `DeviceBlock`; `HostBlock` (emulation/block.h) has the same members, with the same layout of fragments. A kernel that needs one
// says which architecture it needs in `kArchitecture` and is empty when compiled for an earlier one; the host does not start it there.
//
//   copy16, commit_copies, wait_copies       cp.async: 16 bytes a lane; what a lane copied is there for it after its wait, for the other
//                                            lanes of its warp after a `sync_warp` behind that
//   expect_arrivals, expect_bytes, copy_bulk, wait_bytes
//                                            cp.async.bulk and the mbarrier in shared memory that counts its bytes
//   fence_proxy                              what this thread wrote to shared memory comes before copies of the second kind that start later
//   load_matrices, transpose_matrix, multiply
//                                            fragments of mma.m16n8k16, by PTX ISA: lane = 4 * row + column pair
#pragma once

#include <cstdint>

namespace dyrate {

struct DeviceInstructions {
  /// A place in shared memory, in bytes.
  using Place = std::uint32_t;

  /// The compiler does not see what it comes from: it keeps the number in a register instead of making it anew at each use.
  static __device__ __forceinline__ Place place(const void* pointer) {
    Place out;
    asm volatile("{\n .reg .u64 wide;\n cvta.to.shared.u64 wide, %1;\n cvt.u32.u64 %0, wide;\n}" : "=r"(out) : "l"(pointer));
    return out;
  }
  template <class T>
  __device__ __forceinline__ T* keep(T* pointer) {
    asm volatile("" : "+l"(pointer));
    return pointer;
  }
  __device__ __forceinline__ std::uint32_t keep(std::uint32_t number) {
    asm volatile("" : "+r"(number));
    return number;
  }
  __device__ __forceinline__ Bytes16 load16_at(Place from) {
    Bytes16 out;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
                 : "r"(from)
                 : "memory");
    return out;
  }
  __device__ __forceinline__ void clear16_at(Place to) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }
  __device__ __forceinline__ std::uint32_t load4_at(Place from) {
    std::uint32_t out;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out) : "r"(from) : "memory");
    return out;
  }
  __device__ __forceinline__ void store4_at(Place to, std::uint32_t word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory"); }

  /// The lanes of a warp meet; what they wrote before is seen after.
  __device__ __forceinline__ void sync_warp() { __syncwarp(); }

  /// Starts copying 16 bytes from global to shared memory where `here`, zeros where not `live`; both addresses are multiples of 16.
  /// (Conditions are predicates of the instruction: an `if` around it would have its addresses made anew each time.)
  __device__ __forceinline__ void copy16(Place to, const void* from, bool here, bool live) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "{\n .reg .pred here;\n setp.ne.b32 here, %2, 0;\n @here cp.async.cg.shared.global [%0], [%1], 16, %3;\n}" ::"r"(to), "l"(from),
        "r"(static_cast<int>(here)), "r"(live ? 16 : 0)
        : "memory");
#endif
  }
  __device__ __forceinline__ void copy16(Place to, const void* from, bool here) {
#if __CUDA_ARCH__ >= 800
    asm volatile("{\n .reg .pred here;\n setp.ne.b32 here, %2, 0;\n @here cp.async.cg.shared.global [%0], [%1], 16;\n}" ::"r"(to), "l"(from),
                 "r"(static_cast<int>(here))
                 : "memory");
#endif
  }
  /// This thread's copies since the last call become a group.
  __device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  /// All of this thread's groups but the latest `pending` have arrived. 0 .. 2; the same in all lanes.
  __device__ __forceinline__ void wait_copies(int pending) {
#if __CUDA_ARCH__ >= 800
    if (pending == 0) {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    } else if (pending == 1) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    }
#endif
  }

  /// Makes an mbarrier whose phases end when `count` calls of `expect_bytes` and the bytes that they name have come. By one thread, with a
  /// barrier before the others use it.
  __device__ __forceinline__ void expect_arrivals(Place barrier, int count) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void expect_bytes(Place barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
  }
  /// Starts copying whole 16 bytes from global to shared memory; addresses are multiples of 16.
  __device__ __forceinline__ void copy_bulk(Place to, const void* from, int bytes, Place barrier) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
#endif
  }
  /// The barrier's phase of this parity is over: what was copied in it is there for this thread.
  __device__ __forceinline__ void wait_bytes(Place barrier, int parity) {
#if __CUDA_ARCH__ >= 900
    std::uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n .reg .pred over;\n mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n selp.u32 %0, 1, 0, over;\n}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    }
#endif
  }
  __device__ __forceinline__ void fence_proxy() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  }

  /// Four 8 x 8 matrices of 16-bit elements from shared memory; lane 8 * i + r gives the place of row r of matrix i, a multiple of 16.
  /// out[i]: elements 2 * (lane % 4) and the next one of row lane / 4 of matrix i, or of its transpose.
  template <bool kTransposed>
  __device__ __forceinline__ void load_matrices(std::uint32_t (&out)[4], Place row) {
#if __CUDA_ARCH__ >= 800
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                   : "r"(row)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                   : "r"(row)
                   : "memory");
    }
#endif
  }
  /// An 8 x 8 matrix of 16-bit elements in the layout of `load_matrices`, transposed.
  __device__ __forceinline__ std::uint32_t transpose_matrix(std::uint32_t pair) {
    std::uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
#endif
    return out;
  }
  /// c += a * b: a 16 x 16 (matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15), b 16 x 8 (each register two rows of a
  /// column), c 16 x 8 in float32: c[0], c[1] of row lane / 4, columns 2 * (lane % 4) and the next one; c[2], c[3] eight rows below.
  template <class Element>
  __device__ __forceinline__ void multiply(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (Element::kBrain) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
  }
  /// 2 to the power of x; 0 where that has no normal number.
  __device__ __forceinline__ float power(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
  }
  /// Two numbers rounded to elements, the first in the low half.
  template <class Element>
  __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    std::uint32_t out = 0;
#if __CUDA_ARCH__ >= 800
    if constexpr (Element::kBrain) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    }
#endif
    return out;
  }
};

}  // namespace dyrate
