// The product of activations and a packed weight.
#pragma once

#include "layout.h"

namespace vllm_sparse {

struct LinearArgs {
  Kind kind;
  Shape shape;
  const uint8_t* packed;
  const uint16_t* x;  // [m, k] contiguous
  int64_t m;
  const float* bias;  // panels * 8 values or null
  uint16_t* y;        // [m, n] contiguous
};

void linear(const LinearArgs& args);

}  // namespace vllm_sparse
