// Pure reading, the limit that kernels are measured against.
#pragma once

#include <cstdint>

namespace vllm_sparse {

// Reads every byte and returns a checksum, so that the reads cannot be optimised away.
uint64_t read_all(const uint8_t* data, int64_t bytes);

}  // namespace vllm_sparse
