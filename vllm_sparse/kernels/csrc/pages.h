// Memory that may come as 2 MB pages.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace vllm_sparse {

// `bytes` untouched bytes as a uint8 vector, on 2 MB pages where the system gives them. Small ones share pages: a
// weight of a few MB by itself would lie mostly on the 4 KB pages of its ragged ends, from which it streams more
// slowly. The vector is a view of a larger block, which is freed with its last view.
torch::stable::Tensor huge_bytes(const torch::stable::Tensor& like, int64_t bytes);

// Brings [data, data + bytes), which has been written and lies in such memory, onto 2 MB pages now where it could not
// have them at first: memory that page caches have fragmented is only tidied up on demand. A hint like the first.
void join_pages(const uint8_t* data, int64_t bytes);

}  // namespace vllm_sparse
