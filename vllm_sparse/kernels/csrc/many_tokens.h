// Ways to multiply that pay from some number of tokens on, and from how many.
#pragma once

#include <limits>

#include "linear.h"

namespace vllm_sparse {

struct ManyTokens {
  const char* name;
  bool (*supports)(const LinearArgs& args);
  void (*linear)(const LinearArgs& args);
  int64_t (*from)(const ManyTokens& way, Kind kind);  // how many tokens, or kNever
};
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// How many tokens `way` needs to be faster than the loops of kernel.h: by timing both, and as the first call of this
// process found. Throws std::runtime_error where the two give different products.
int64_t measure_many_tokens(const ManyTokens& way, Kind kind);
int64_t measured_once(const ManyTokens& way, Kind kind);

}  // namespace vllm_sparse
