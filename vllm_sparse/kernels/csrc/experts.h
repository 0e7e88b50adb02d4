// The experts of a mixture-of-experts layer: every chosen expert's gate, up and down product in one call.
#pragma once

#include "linear.h"

namespace vllm_sparse {

enum class Activation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };
constexpr int64_t kActivations = 3;

// One projection of all experts, one after the other.
struct Projection {
  Shape shape;
  const uint8_t* packed;
  const float* scale;   // or null
  int64_t scale_count;  // numbers per expert
};

struct ExpertsArgs {
  Kind kind;
  Activation activation;
  bool half;      // activations and outputs are fp16, else bf16
  int64_t group;  // columns that share a scale; 0: one scale per output channel
  int64_t experts;
  Projection gate_up;  // gate's rows, then up's
  Projection down;
  const uint16_t* x;  // [m, hidden]
  int64_t m;
  const int64_t* ids;    // [m, top_k]; negative: not on this rank
  const float* weights;  // [m, top_k]
  int64_t top_k;
  uint16_t* y;  // [m, hidden]
};

// Each output is the weighted sum of its token's experts, accumulated in float32 in the order of the experts.
void experts(const ExpertsArgs& args);

}  // namespace vllm_sparse
