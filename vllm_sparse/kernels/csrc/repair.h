// What pruned weights owe to activations that are not finite.
#pragma once

#include "linear.h"

namespace vllm_sparse {

// A dense product multiplies pruned weights too: 0 * NaN and 0 * infinity are NaN. Gives a token's outputs what dense
// would: rows that do not keep a non-finite column become NaN, and a NaN reaches every row.
void repair_token(const LinearArgs& args, const uint16_t* x, uint16_t* y);

}  // namespace vllm_sparse
