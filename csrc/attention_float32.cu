#include "attention.h"

namespace dyrate {

template Status start_attention<float>(const AttentionCall&, Stream);

}  // namespace dyrate
