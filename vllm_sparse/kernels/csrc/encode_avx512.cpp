// 64 bytes a step: the non-zero bits are a mask register, and one instruction moves the kept values together.
#include "encode_avx512.h"

#include <immintrin.h>

#include <bit>
#include <cstring>

namespace vllm_sparse {
namespace {

template <int kWidth, bool kFloating>
inline uint64_t nonzero_mask(__m512i v) {
  if constexpr (kWidth == 1) {
    return _mm512_test_epi8_mask(v, _mm512_set1_epi8(kFloating ? 0x7F : -1));
  } else {
    return _mm512_test_epi16_mask(v, _mm512_set1_epi16(kFloating ? 0x7FFF : -1));
  }
}

// Nibbles of a mask with more than two bits.
inline int64_t crowded_nibbles(uint64_t mask) {
  const uint64_t pairs = (mask & 0x5555555555555555) + (mask >> 1 & 0x5555555555555555);
  const uint64_t sums = (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333);
  return std::popcount((sums + 0x5555555555555555) & 0x8888888888888888);
}

template <int kWidth, bool kFloating>
Counts count(const uint8_t* values, int64_t bytes) {
  Counts found;
  for (int64_t i = 0; i < bytes; i += kEncodeStep) {
    const uint64_t mask = nonzero_mask<kWidth, kFloating>(_mm512_loadu_si512(values + i));
    found.nonzeros += std::popcount(mask);
    found.crowded += crowded_nibbles(mask);
  }
  return found;
}

template <int kWidth, bool kFloating>
int64_t encode(const uint8_t* values, int64_t bytes, const uint8_t* stored, uint8_t* kept, uint8_t* bitmask) {
  constexpr int kMaskBytes = static_cast<int>(kEncodeStep) / kWidth / 8;
  int64_t crowded = 0;
  for (int64_t i = 0; i < bytes; i += kEncodeStep) {
    const __m512i v = _mm512_loadu_si512(values + i);
    const uint64_t mask = nonzero_mask<kWidth, kFloating>(v);
    crowded += crowded_nibbles(mask);
    uint64_t keep = 0;
    for (int b = 0; b < kMaskBytes; ++b) keep |= static_cast<uint64_t>(stored[mask >> 8 * b & 255]) << 8 * b;
    __m512i packed;
    if constexpr (kWidth == 1) {
      packed = _mm512_maskz_compress_epi8(keep, v);
    } else {
      packed = _mm512_maskz_compress_epi16(static_cast<__mmask32>(keep), v);
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept), _mm512_castsi512_si256(packed));
    std::memcpy(bitmask, &keep, kMaskBytes);
    kept += kEncodeStep / 2;
    bitmask += kMaskBytes;
  }
  return crowded;
}

}  // namespace

const EncodeVectors kEncodeAvx512 = {
    {{count<1, false>, count<1, true>}, {count<2, false>, count<2, true>}},
    {{encode<1, false>, encode<1, true>}, {encode<2, false>, encode<2, true>}},
};

}  // namespace vllm_sparse
