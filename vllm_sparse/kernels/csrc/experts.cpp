#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "convert.h"
#include "parallel.h"

namespace vllm_sparse {
namespace {

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0f + std::exp(-x));
    case Activation::kGelu: return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    default: return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  }
}

// (token, slot) pairs by expert: those of expert e are order[start[e]] .. order[start[e + 1] - 1], as token *
// top_k + slot, in the order of the tokens.
struct Routing {
  std::vector<int64_t> start;
  std::vector<int64_t> order;
};

Routing route(const ExpertsArgs& args) {
  Routing routing;
  const int64_t count = args.m * args.top_k;
  routing.start.assign(args.experts + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    if (args.ids[i] >= 0) ++routing.start[args.ids[i] + 1];
  }
  for (int64_t e = 0; e < args.experts; ++e) routing.start[e + 1] += routing.start[e];
  routing.order.resize(routing.start.back());
  std::vector<int64_t> next(routing.start.begin(), routing.start.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    if (args.ids[i] >= 0) routing.order[next[args.ids[i]]++] = i;
  }
  return routing;
}

void project(const ExpertsArgs& args, const Projection& projection, int64_t expert, const uint16_t* x, int64_t m,
             uint16_t* y) {
  LinearArgs linear_args{};
  linear_args.kind = args.kind;
  linear_args.shape = projection.shape;
  linear_args.half = args.half;
  linear_args.packed = projection.packed + expert * projection.shape.packed_bytes(args.kind);
  linear_args.x = x;
  linear_args.m = m;
  linear_args.y = y;
  if (projection.scale != nullptr) {
    set_scales(linear_args, projection.scale + expert * projection.scale_count, args.group);
  }
  linear(linear_args);
}

// [rows, 2 * width] -> [rows, width].
template <bool Half>
void gate(const ExpertsArgs& args, const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out) {
  for_ranges(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint16_t* gates = gate_up + r * 2 * width;
      for (int64_t c = 0; c < width; ++c) {
        const float product = activate(args.activation, to_float<Half>(gates[c])) * to_float<Half>(gates[width + c]);
        out[r * width + c] = from_float<Half>(product);
      }
    }
  });
}

template <bool Half>
void add_weighted(const ExpertsArgs& args, const int64_t* chosen, int64_t rows, const uint16_t* result, float* sums) {
  const int64_t hidden = args.down.shape.n;
  // An expert has a token once, so rows never share a target.
  for_ranges(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float weight = args.weights[chosen[r]];
      float* to = sums + chosen[r] / args.top_k * hidden;
      for (int64_t c = 0; c < hidden; ++c) to[c] += weight * to_float<Half>(result[r * hidden + c]);
    }
  });
}

// The rows that one expert works on.
const uint16_t* gathered(const ExpertsArgs& args, const int64_t* chosen, int64_t rows) {
  const int64_t hidden = args.gate_up.shape.k;
  if (rows == 1) return args.x + chosen[0] / args.top_k * hidden;
  thread_local Scratch scratch;
  uint16_t* out = scratch.get<uint16_t>(rows * hidden);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * hidden, args.x + chosen[r] / args.top_k * hidden, hidden * sizeof(uint16_t));
  }
  return out;
}

template <bool Half>
void run(const ExpertsArgs& args) {
  thread_local Scratch gate_up_scratch, inner_scratch, result_scratch, sum_scratch;
  const Routing routing = route(args);
  const int64_t hidden = args.down.shape.n;
  const int64_t width = args.down.shape.k;
  float* sums = sum_scratch.get<float>(args.m * hidden);
  std::fill(sums, sums + args.m * hidden, 0.0f);
  for (int64_t e = 0; e < args.experts; ++e) {
    const int64_t rows = routing.start[e + 1] - routing.start[e];
    if (rows == 0) continue;
    const int64_t* chosen = routing.order.data() + routing.start[e];
    uint16_t* gate_up = gate_up_scratch.get<uint16_t>(rows * 2 * width);
    uint16_t* inner = inner_scratch.get<uint16_t>(rows * width);
    uint16_t* result = result_scratch.get<uint16_t>(rows * hidden);
    project(args, args.gate_up, e, gathered(args, chosen, rows), rows, gate_up);
    gate<Half>(args, gate_up, rows, width, inner);
    project(args, args.down, e, inner, rows, result);
    add_weighted<Half>(args, chosen, rows, result, sums);
  }
  for (int64_t i = 0; i < args.m * hidden; ++i) args.y[i] = from_float<Half>(sums[i]);
}

}  // namespace

void experts(const ExpertsArgs& args) { args.half ? run<true>(args) : run<false>(args); }

}  // namespace vllm_sparse
