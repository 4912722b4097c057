#include "attention.h"

namespace dyrate {

template Status start_attention<Float16>(const AttentionCall&, Stream);

}  // namespace dyrate
