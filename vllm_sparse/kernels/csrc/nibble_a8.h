// int4 weights with int8 activations where no kernel reads nibbles: unpacked to int8 blocks for the level's int8
// loops, a run of blocks of the same scale groups at a time, whose sums are scaled and added up in float32.
//
// The int8 loops leave their sums in dwords of which lane l belongs to row l mod 2 of its pair and to the half
// l / 2 mod 2 of the blocks; `kUsed` lanes are written.
#pragma once

#if defined(__SSE4_1__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>

#include "convert.h"
#include "group_runs.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

constexpr int64_t kRunBlocks = 8;

#if !defined(__SSE4_1__)
// Eight nibbles to eight signed bytes.
inline uint64_t spread_nibbles(uint32_t nibbles) {
  uint64_t x = nibbles;
  x = (x | x << 16) & 0x0000FFFF0000FFFF;
  x = (x | x << 8) & 0x00FF00FF00FF00FF;
  x = (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
  // Bytes from 8 below zero up, without a borrow between them.
  constexpr uint64_t kTops = 0x8080808080808080, kEights = 0x0808080808080808;
  return (((x ^ kEights) | kTops) - kEights) ^ kTops;
}
#endif

#if defined(__SSE4_1__)

// Both units of a pair of rows, whose octets alternate in the line.
inline void unpack_pair(const uint8_t* units, uint8_t* line) {
  const __m128i fifteen = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  __m128i octets[2][2];
  for (int u = 0; u < 2; ++u) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(units) + u);
    // Signed: 8 to 15 are -8 to -1.
    const __m128i low = _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(bytes, fifteen), eight), eight);
    const __m128i high = _mm_sub_epi8(_mm_xor_si128(_mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen), eight), eight);
    const __m128i first = _mm_unpacklo_epi8(low, high), second = _mm_unpackhi_epi8(low, high);
    octets[u][0] = _mm_unpacklo_epi32(first, second);
    octets[u][1] = _mm_unpackhi_epi32(first, second);
  }
  for (int half = 0; half < 2; ++half) {
    __m128i* const to = reinterpret_cast<__m128i*>(line) + 2 * half;
    _mm_storeu_si128(to, _mm_unpacklo_epi64(octets[0][half], octets[1][half]));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi64(octets[0][half], octets[1][half]));
  }
}

inline void unpack_block(const uint8_t* block, uint8_t* out) {
  std::memcpy(out, block, kMetadataBytes);
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    unpack_pair(block + kMetadataBytes + 2 * unit_bytes(Kind::kInt4A8) * pair, out + kMetadataBytes + kLine * pair);
  }
}

#else

inline void unpack_block(const uint8_t* block, uint8_t* out) {
  std::memcpy(out, block, kMetadataBytes);
  for (int64_t u = 0; u < kUnits; ++u) {
    uint64_t rows[2];
    std::memcpy(rows, block + kMetadataBytes + unit_bytes(Kind::kInt4A8) * u, sizeof(rows));
    for (int64_t octet = 0; octet < 4; ++octet) {
      const auto first = static_cast<uint32_t>(rows[0] >> 16 * octet & 0xFFFF);
      const auto second = static_cast<uint32_t>(rows[1] >> 16 * octet & 0xFFFF);
      const uint64_t bytes = spread_nibbles(first | second << 16);
      std::memcpy(out + kMetadataBytes + byte_offset({u, 8 * octet}), &bytes, sizeof(bytes));
    }
  }
}

#endif

template <int kUsed>
inline void add_scaled(const int32_t* sums, int tokens, const GroupRuns& runs, float* acc) {
  for (int p = 0; p < kPairs; ++p) {
    float scale[kUsed];
    for (int l = 0; l < kUsed; ++l) {
      const float* scales = runs.scales(l / 2 % 2);
      scale[l] = scales == nullptr ? 1.0f : scales[2 * p + l % 2];
    }
    for (int64_t at = int64_t{p} * tokens * kLanes; at < (p + 1) * int64_t{tokens} * kLanes; at += kLanes) {
      for (int l = 0; l < kUsed; ++l) acc[at + l] += scale[l] * static_cast<float>(sums[at + l]);
    }
  }
}

template <SlabFn kInt8Slab, int kUsed>
void slab_a4(const Slab& slab, void* accumulators) {
  constexpr int64_t kBytes = block_bytes(Kind::kInt4A8);
  alignas(64) uint8_t unpacked[kRunBlocks * block_bytes(Kind::kInt8A8)];
  alignas(64) int32_t sums[kAccumulators * kMaxInt4A8Tile];
  float* acc = static_cast<float*>(accumulators);
  if (slab.fresh) std::memset(acc, 0, sizeof(float) * kAccumulators * slab.tokens);
  Slab part = slab;
  part.packed = unpacked;
  part.next = nullptr;
  part.fresh = true;
  GroupRuns runs(slab);
  for (int64_t b = 0; b < slab.blocks; b += part.blocks) {
    part.blocks = std::min({runs.blocks(), slab.blocks - b, kRunBlocks});
    part.x = slab.x + b * kLine * slab.tokens;
    for (int64_t i = 0; i < part.blocks; ++i) {
      unpack_block(slab.packed + (b + i) * kBytes, unpacked + i * block_bytes(Kind::kInt8A8));
    }
    kInt8Slab(part, sums);
    add_scaled<kUsed>(sums, slab.tokens, runs, acc);
    runs.advance(part.blocks);
  }
}

template <bool Half, int kUsed>
void store_a4(const void* accumulators, int tokens, const Epilogue& out) {
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < out.rows; ++r) {
      const float* lanes = static_cast<const float*>(accumulators) + ((r / 2) * tokens + t) * kLanes;
      float sum = 0.0f;
      for (int l = r % 2; l < kUsed; l += 2) sum += lanes[l];
      sum = (sum - out.correction[r]) * out.token_scale[t];
      if (out.scale != nullptr) sum *= out.scale[r];
      if (out.bias != nullptr) sum += out.bias[r];
      out.y[t * out.ldy + r] = from_float<Half>(sum);
    }
  }
}

}  // namespace
}  // namespace vllm_sparse
