#include "rows.h"

namespace dyrate {

Status compact(const CompactCall& call, int movers, Stream stream) {
  return launch<CompactKernel>(
      {static_cast<unsigned>(movers), static_cast<unsigned>(call.tensors), static_cast<unsigned>(call.batch)}, stream, call);
}

Status reorder(const ReorderCall& call, int blocks, Stream stream) {
  return launch<ReorderKernel>({static_cast<unsigned>(blocks), static_cast<unsigned>(call.tensors), 1}, stream, call);
}

}  // namespace dyrate
