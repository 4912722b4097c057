#include "attention_start.h"

namespace dyrate {

template Status start_attention<BFloat16>(const AttentionCall&, Stream);

}  // namespace dyrate
