#include "decision.h"

namespace dyrate {

Status decide(const DecideCall& call, Stream stream) {
  const int blocks = call.kept_in ? 1 : (call.visual_capacity + kColumns - 1) / kColumns;
  return launch<DecideKernel>({static_cast<unsigned>(blocks > 0 ? blocks : 1), static_cast<unsigned>(call.batch), 1}, stream, call);
}

Status select_tokens(const SelectCall& call, Stream stream) {
  return launch<SelectKernel>({static_cast<unsigned>(call.batch), 1, 1}, stream, call);
}

Status predict_rate(const PredictCall& call, Stream stream) {
  return launch<PredictKernel>({static_cast<unsigned>(call.batch), 1, 1}, stream, call);
}

}  // namespace dyrate
