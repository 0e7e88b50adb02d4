// From a sum to a result: scales, bias, rounding. The same for every kernel.
#pragma once

#include "problem.h"
#include "values.cuh"

namespace sparse24 {

// A lane's sums, [row tile][eight tokens][4], as sparse products leave them: handed over one by one with the row among
// the warp's and the token among the pass's.
template <class Sum, int ROW_TILES, int TOKEN_TILES, class Use>
SPARSE24_DEVICE void for_each_sum(const Sum (&sums)[ROW_TILES][TOKEN_TILES][4], int lane, Use use) {
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
    for (int tokens8 = 0; tokens8 < TOKEN_TILES; ++tokens8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        use(sums[r][tokens8][i], 16 * r + lane / 4 + 8 * (i / 2), 8 * tokens8 + 2 * (lane % 4) + i % 2);
      }
    }
  }
}

template <class Sum, int ROW_TILES, int TOKEN_TILES>
SPARSE24_DEVICE void clear(Sum (&sums)[ROW_TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int i = 0; i < 4 * TOKEN_TILES * ROW_TILES; ++i) sums[i / 4 / TOKEN_TILES][i / 4 % TOKEN_TILES][i % 4] = 0;
}

// What one row of the weight multiplies its sums by, and adds to them.
struct RowEnd {
  float scale;
  float bias;
};

template <class T, Format F>
SPARSE24_DEVICE RowEnd row_end(const Problem& p, int row) {
  RowEnd end{1.0f, 0.0f};
  if (p.scale != nullptr && p.group == 0) {
    const float scale = machine::load_global(static_cast<const float*>(p.scale) + row);
    end.scale = F == Format::kFp8 ? scale * 256.0f : scale;
  }
  if (p.bias != nullptr) {
    end.bias = machine::from_sixteen_bits<T>(machine::load_global(static_cast<const uint16_t*>(p.bias) + row));
  }
  return end;
}

// A number of a 16-bit type of which only the number is known: 1 bfloat16, 2 float16.
SPARSE24_DEVICE float number_of(int type, uint16_t bits) {
  return type == 1 ? machine::from_sixteen_bits<Bf16>(bits) : machine::from_sixteen_bits<Fp16>(bits);
}

// Element `at` of scales stored as the problem says.
SPARSE24_DEVICE float stored_scale(const Problem& p, int64_t at) {
  if (p.scale_type == 0) return machine::load_global(static_cast<const float*>(p.scale) + at);
  return number_of(p.scale_type, machine::load_global(static_cast<const uint16_t*>(p.scale) + at));
}

SPARSE24_DEVICE float token_factor(const Problem& p, int token) {
  return p.token_scale == nullptr ? 1.0f : machine::load_global(p.token_scale + token);
}

template <class T>
SPARSE24_DEVICE uint16_t rounded_result(float sum, const RowEnd& row, float token) {
  return machine::round_to_sixteen_bits<T>(sum * row.scale * token + row.bias);
}

}  // namespace sparse24
