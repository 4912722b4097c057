// Which attention kernel a call takes, and its launch.
#pragma once

#include "attention.h"
#include "attention_staged.h"

namespace dyrate {

template <class Element, int kDim, int kGroup, bool kAligned>
Status start_registers(const AttentionCall& call, Stream stream) {
  const int chunks = (call.heads / call.kv_heads + kGroup - 1) / kGroup;
  const Grid grid{static_cast<unsigned>(call.max_splits), static_cast<unsigned>(call.kv_heads * chunks), static_cast<unsigned>(call.batch)};
  return launch<AttentionKernel<Element, kDim, kGroup, kAligned>>(grid, stream, call);
}

template <class Element, int kDim, int kUnit, bool kBulk>
Status start_staged(const AttentionCall& call, Stream stream) {
  const int chunks = (call.heads / call.kv_heads + kUnit - 1) / kUnit;
  const Grid grid{static_cast<unsigned>(call.max_splits), static_cast<unsigned>(call.kv_heads * chunks), static_cast<unsigned>(call.batch)};
  return launch<StagedKernel<Element, kDim, kUnit, kBulk>>(grid, stream, call, call.stages * staged_bytes(kUnit, kDim));
}

template <class Element, int kDim, int kUnit>
Status start_staged(const AttentionCall& call, Stream stream) {
  if constexpr (kUnit <= kBulkUnit) {
    if (call.bulk) return start_staged<Element, kDim, kUnit, true>(call, stream);
  }
  return start_staged<Element, kDim, kUnit, false>(call, stream);
}

template <class Element, int kDim>
Status start_attention(const AttentionCall& call, Stream stream) {
  if constexpr (sizeof(Element) == 2) {
    if (call.unit == 1) return start_staged<Element, kDim, 1>(call, stream);
    if (call.unit == 8) return start_staged<Element, kDim, 8>(call, stream);
    if (call.unit == 16) return start_staged<Element, kDim, 16>(call, stream);
  }
  switch (group_block(call.heads / call.kv_heads)) {
    case 1: return start_registers<Element, kDim, 1, true>(call, stream);
    case 4: return start_registers<Element, kDim, 4, true>(call, stream);
    default: return start_registers<Element, kDim, 8, true>(call, stream);
  }
}

/// The kernel for the call's shape. Each element type is instantiated in a file of its own.
template <class Element>
Status start_attention(const AttentionCall& call, Stream stream) {
  const int dim = call.dim > call.value_dim ? call.dim : call.value_dim;
  if (!aligned(call)) return start_registers<Element, kMostDim, 8, false>(call, stream);
  if (dim <= 64) return start_attention<Element, 64>(call, stream);
  if (dim <= kUsualDim) return start_attention<Element, kUsualDim>(call, stream);
  return start_registers<Element, kMostDim, 8, true>(call, stream);  // no supported model has such heads: one kernel for any group
}

extern template Status start_attention<Float16>(const AttentionCall&, Stream);
extern template Status start_attention<BFloat16>(const AttentionCall&, Stream);
extern template Status start_attention<float>(const AttentionCall&, Stream);

}  // namespace dyrate
