// Which instruction-set level runs.
#pragma once

#include "kernel.h"
#include "tiles.h"

namespace vllm_sparse {

// Bit i is set if this processor (and operating system) can execute level i.
int supported_levels();
// The level in use: the best supported one, or the one that set_level chose.
int current_level();
// Returns false, changing nothing, if this processor cannot execute `level`.
bool set_level(int level);
const Level& kernels();
// The level's matrix unit, or null.
const MatrixUnit* matrix_unit();

}  // namespace vllm_sparse
