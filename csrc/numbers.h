// Numbers as the kernels see them: element types, 16-byte groups of elements, integer keys in the order of floats.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "calls.h"
#include "simt.h"

namespace dyrate {

template <class To, class From>
DYRATE_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Elements as they lie in memory. All arithmetic is float32.
struct Float16 {
  static constexpr bool kBrain = false;
  std::uint16_t bits;
};
struct BFloat16 {
  static constexpr bool kBrain = true;
  std::uint16_t bits;
};

DYRATE_HD float to_float(float x) { return x; }
DYRATE_HD float to_float(BFloat16 x) { return bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16); }
DYRATE_HD float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
  float result;  // by hand: cuda_fp16.h would double what the compiler has to read
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return bits_as<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);  // infinity, NaN
  const float scaled = bits_as<float>(magnitude << 13) * 5.192296858534828e33f;                       // 2 ** 112: the exponents' bias
  return bits_as<float>(sign | bits_as<std::uint32_t>(scaled));
#endif
}

DYRATE_HD void from_float(float x, float* out) { *out = x; }
DYRATE_HD void from_float(float x, BFloat16* out) {
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  out->bits = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
DYRATE_HD void from_float(float x, Float16* out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const std::uint32_t bits = bits_as<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  std::uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2 ** -14: adding 0.5 leaves multiples of 2 ** -24 in the low bits
    half = bits_as<std::uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
#endif
}

/// The place of the lowest bit; there is one.
DYRATE_HD int lowest_bit(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}
DYRATE_HD int count_bits(std::uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

/// How many elements 16 bytes hold.
template <class Element>
constexpr int kPerGroup = 16 / static_cast<int>(sizeof(Element));

/// The elements of 16 bytes in float32.
DYRATE_HD void unpack(Bytes16 group, float (&out)[4], const float*) {
  DYRATE_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = bits_as<float>(group.word[i]);
}
DYRATE_HD void unpack(Bytes16 group, float (&out)[8], const BFloat16*) {
  DYRATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_as<float>(group.word[i] << 16);
    out[2 * i + 1] = bits_as<float>(group.word[i] & 0xFFFF0000u);
  }
}
DYRATE_HD void unpack(Bytes16 group, float (&out)[8], const Float16*) {
  DYRATE_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float(Float16{static_cast<std::uint16_t>(group.word[i] & 0xFFFFu)});
    out[2 * i + 1] = to_float(Float16{static_cast<std::uint16_t>(group.word[i] >> 16)});
  }
}

/// 16 bytes from an address that may not be a multiple of 16, of which the first `elements` exist; zeros behind them.
template <class Element>
DYRATE_HD Bytes16 gather16(const Element* address, int elements) {
  Bytes16 group{{0, 0, 0, 0}};
  DYRATE_UNROLL
  for (int i = 0; i < kPerGroup<Element>; ++i) {
    if (i < elements) {
      if constexpr (sizeof(Element) == 4) {
        group.word[i] = bits_as<std::uint32_t>(address[i]);
      } else {
        group.word[i / 2] |= static_cast<std::uint32_t>(address[i].bits) << (i % 2 * 16);
      }
    }
  }
  return group;
}

/// An element of a tensor whose type is known at run time.
DYRATE_HD float load_float(const void* base, std::int64_t index, Type type) {
  switch (type) {
    case Type::kFloat16: return to_float(static_cast<const Float16*>(base)[index]);
    case Type::kBFloat16: return to_float(static_cast<const BFloat16*>(base)[index]);
    case Type::kFloat64: return static_cast<float>(static_cast<const double*>(base)[index]);
    default: return static_cast<const float*>(base)[index];
  }
}

/// Integers in the order of floats: zeros of either sign equal, NaN 1, never 0. So denormals, zeros and NaN order alike everywhere.
DYRATE_HD std::uint32_t order_key(float value) {
  std::uint32_t bits = bits_as<std::uint32_t>(value);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 1;
  if (magnitude == 0) bits = 0;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DYRATE_HD std::uint64_t order_key(double value) {
  std::uint64_t bits = bits_as<std::uint64_t>(value);
  const std::uint64_t magnitude = bits & 0x7FFFFFFFFFFFFFFFu;
  if (magnitude > 0x7FF0000000000000u) return 1;
  if (magnitude == 0) bits = 0;
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

}  // namespace dyrate
