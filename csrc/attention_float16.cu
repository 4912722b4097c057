#include "attention_start.h"

namespace dyrate {

template Status start_attention<Float16>(const AttentionCall&, Stream);

}  // namespace dyrate
