// Which instruction-set level runs.
#pragma once

#include "kernel.h"
#include "many_tokens.h"

namespace vllm_sparse {

// Bit i is set if this processor (and operating system) can execute level i.
int supported_levels();
// The level in use: the best supported one, or the one that set_level chose.
int current_level();
// Returns false, changing nothing, if this processor cannot execute `level`.
bool set_level(int level);
const Level& kernels();
// The level's way for many tokens, or null.
const ManyTokens* many_tokens();

}  // namespace vllm_sparse
