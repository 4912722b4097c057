#include "attention_start.h"

namespace dyrate {

template Status start_attention<float>(const AttentionCall&, Stream);

Status decode_attention(const AttentionCall& call, Stream stream) {
  switch (call.type) {
    case Type::kFloat16: return start_attention<Float16>(call, stream);
    case Type::kBFloat16: return start_attention<BFloat16>(call, stream);
    default: return start_attention<float>(call, stream);
  }
}

}  // namespace dyrate
