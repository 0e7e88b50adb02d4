// Activation gathering shared by all levels; compiled inside each level's file with that level's flags.
#pragma once

#include <cstring>

#include "kernel.h"

namespace vllm_sparse {
namespace {

// Prefetches into L2 this pass's share of a block's cache lines; `passes` passes cover the block.
template <int kPasses>
inline void prefetch_block(const uint8_t* block, int pass) {
  constexpr int kLines = 9;
  constexpr int kShare = (kLines + kPasses - 1) / kPasses;
  for (int line = pass * kShare; line < (pass + 1) * kShare && line < kLines; ++line) {
    __builtin_prefetch(block + 64 * line, 0, 2);
  }
}

template <bool Half>
inline bool any_non_finite(const uint16_t* x, int64_t count) {
  // No early exit, so that the compiler can vectorise.
  uint16_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    found |= static_cast<uint16_t>((x[i] & kExponentMask<Half>) == kExponentMask<Half>);
  }
  return found != 0;
}

template <bool Half>
bool gather_tile(const uint16_t* x, int64_t ldx, int64_t k, int tokens, uint16_t* target) {
  bool special = false;
  const int64_t whole = k / kChunk;
  const int64_t chunks = ceil_div(k, kBlockColumns) * (kBlockColumns / kChunk);
  for (int t = 0; t < tokens; ++t) {
    const uint16_t* row = x + t * ldx;
    special |= any_non_finite<Half>(row, k);
    if (target == nullptr) continue;
    uint16_t* to = target + t * kChunk;
    const int64_t step = tokens * kChunk;
    for (int64_t c = 0; c < whole; ++c, to += step) {
      std::memcpy(to, row + c * kChunk, kChunk * sizeof(uint16_t));
    }
    for (int64_t c = whole; c < chunks; ++c, to += step) {
      const int64_t left = k > c * kChunk ? k - c * kChunk : 0;
      std::memset(to, 0, kChunk * sizeof(uint16_t));
      if (left > 0) std::memcpy(to, row + c * kChunk, left * sizeof(uint16_t));
    }
  }
  return special;
}

}  // namespace
}  // namespace vllm_sparse
