// Cutting a number of things into nearly equal parts.
#pragma once

#include <algorithm>

#include "layout.h"

namespace vllm_sparse {

// `total` things in as few parts as hold `most` each.
struct Parts {
  int64_t total, most;
  int64_t count() const { return ceil_div(total, most); }
  int64_t start(int64_t i) const { return i * (total / count()) + std::min(i, total % count()); }
  int size(int64_t i) const { return static_cast<int>(start(i + 1) - start(i)); }
};

}  // namespace vllm_sparse
