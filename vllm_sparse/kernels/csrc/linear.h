// The product of activations and a packed weight.
#pragma once

#include "layout.h"

namespace vllm_sparse {

struct LinearArgs {
  Kind kind;
  Shape shape;
  bool half;  // activations and outputs are fp16, else bf16
  const uint8_t* packed;
  const uint16_t* x;  // [m, k] contiguous
  int64_t m;
  const float* channel_scale;  // [padded n] or null
  const float* group_scale;    // [panels][groups][8] or null
  int64_t group;               // columns that share a group scale
  const float* correction;     // [padded n]: 128 * sum of a row's values, by their group scales if there are any; only
                               // for int8 activations
  const float* bias;           // [padded n] or null
  uint16_t* y;                 // [m, n] contiguous
  float* wide;                 // the same, unrounded, instead of y, or null; only for dense weights
};

// Scales (and corrections) in the order that the operators' schemas describe.
void set_scales(LinearArgs& args, const float* scale, int64_t group);

// Group scales of a panel, or null.
inline const float* panel_scales(const LinearArgs& args, int64_t panel) {
  if (args.group_scale == nullptr) return nullptr;
  return args.group_scale + panel * ceil_div(args.shape.padded_k(), args.group) * kPanelRows;
}

// The product, by whichever way is faster for so many tokens; and always by the loops of kernel.h.
void linear(const LinearArgs& args);
void linear_loops(const LinearArgs& args);

}  // namespace vllm_sparse
