// Gathering and quantising activations, shared by all levels; compiled inside each level's file with that
// level's flags, which is what vectorises these loops.
#pragma once

#include <cstring>

#include "convert.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

// Prefetches into L2 this pass's share of a block's cache lines; `passes` passes cover the block.
template <int kPasses>
inline void prefetch_block(const uint8_t* block, int64_t bytes, int pass) {
  const int64_t lines = bytes / kLine;
  const int64_t share = (lines + kPasses - 1) / kPasses;
  for (int64_t line = pass * share; line < (pass + 1) * share && line < lines; ++line) {
    __builtin_prefetch(block + kLine * line, 0, 2);
  }
}

// Largest magnitude as a bit pattern: the bits of 16-bit floats without sign are ordered as their values. No
// early exit, so that the compiler can vectorise.
inline uint16_t largest_magnitude(const uint16_t* x, int64_t count) {
  uint16_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t magnitude = x[i] & 0x7FFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <bool Half>
bool gather(const Tile& tile, uint8_t* target) {
  bool special = false;
  const int64_t chunks = ceil_div(tile.k, kBlockColumns) * (kBlockColumns / kChunk);
  const int64_t step = tile.tokens * kLine;
  for (int t = 0; t < tile.tokens; ++t) {
    const uint16_t* row = tile.x + t * tile.k;
    special |= largest_magnitude(row, tile.k) >= kExponentMask<Half>;
    if (target == nullptr) continue;
    uint8_t* to = target + t * kLine;
    for (int64_t c = 0; c < chunks; ++c, to += step) {
      const int64_t left = tile.k - c * kChunk;
      if (left >= kChunk) {
        std::memcpy(to, row + c * kChunk, kLine);
      } else {
        std::memset(to, 0, kLine);
        if (left > 0) std::memcpy(to, row + c * kChunk, left * sizeof(uint16_t));
      }
    }
  }
  return special;
}

// 64 columns in order to a chunk. Octet j of it holds columns 32 (j mod 2) + 8 (j / 2).
inline void arrange_octets(const uint8_t* bytes, uint8_t* chunk) {
  for (int j = 0; j < 8; ++j) std::memcpy(chunk + 8 * j, bytes + 32 * (j % 2) + 8 * (j / 2), 8);
}

using Arrange = void (*)(const uint8_t* bytes, uint8_t* chunk);

// Quantises up to 64 columns into one chunk.
template <bool Half, Arrange kArrange>
inline void quantize_chunk(const uint16_t* x, int64_t count, float inverse, uint8_t* chunk) {
  uint8_t bytes[kBlockColumns];
  std::memset(bytes, 128, sizeof(bytes));
  for (int64_t c = 0; c < count; ++c) {
    // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits.
    const float shifted = to_float<Half>(x[c]) * inverse + 12582912.0f;
    bytes[c] = static_cast<uint8_t>(float_to_bits(shifted) + 128u);
  }
  kArrange(bytes, chunk);
}

template <bool Half, Arrange kArrange = arrange_octets>
void quantize(const Tile& tile, uint8_t* target, float* scales) {
  constexpr float kMost = 127.0f;
  const int64_t chunks = ceil_div(tile.k, kBlockColumns);
  for (int t = 0; t < tile.tokens; ++t) {
    const uint16_t* row = tile.x + t * tile.k;
    const uint16_t largest = largest_magnitude(row, tile.k);
    const float amax = to_float<Half>(largest);
    const bool finite = largest < kExponentMask<Half>;
    // The smallest magnitudes would make the inverse infinite; such a token is zero at int8 resolution.
    const bool usable = finite && amax > 1e-30f;
    const float inverse = usable ? kMost / amax : 0.0f;
    scales[t] = finite ? amax / kMost : bits_to_float(0x7FC00000u);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t left = tile.k - c * kBlockColumns;
      uint8_t* chunk = target + (c * tile.tokens + t) * kLine;
      if (!usable) {
        std::memset(chunk, 128, kLine);
      } else if (left >= kBlockColumns) {
        quantize_chunk<Half, kArrange>(row + c * kBlockColumns, kBlockColumns, inverse, chunk);
      } else {
        quantize_chunk<Half, kArrange>(row + c * kBlockColumns, left, inverse, chunk);
      }
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
