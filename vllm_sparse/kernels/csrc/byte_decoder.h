// 2-bit codes to permute controls, int8 and fp8 values to 16-bit floats, in registers; needs AVX-512 VBMI.
#pragma once

#include "avx512.h"

namespace vllm_sparse {
namespace {

// vpmultishiftqb brings the code of element i to the bottom of element i, a ternary logic masks it and adds the
// element's first column.
inline __m512i decode_codes(__m512i codes, __m512i control, __m512i mask, __m512i first) {
  return _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(control, codes), mask, first, 0xEA);
}

// Bits of the 16-bit float m * 2^e, which must be exact; m < 256.
template <bool Half>
constexpr uint16_t exact_bits(int m, int e) {
  if (m == 0) return 0;
  constexpr int kFraction = Half ? 10 : 7;
  constexpr int kBias = Half ? 15 : 127;
  int top = 0;
  while (m >> (top + 1)) ++top;
  const int exponent = top + e + kBias;
  if (exponent <= 0) return static_cast<uint16_t>(m << (e + kBias + kFraction - 1));  // subnormal
  const int fraction = (m << kFraction >> top) & ((1 << kFraction) - 1);
  return static_cast<uint16_t>(exponent << kFraction | fraction);
}

// Magnitude of fp8 code c (7 bits), divided by 256, or of the integer c.
template <bool Half, Kind kKind>
constexpr uint16_t code_bits(int c) {
  if (kKind == Kind::kInt8) return exact_bits<Half>(c, 0);
  const int exponent = c >> 3;
  return exact_bits<Half>(exponent == 0 ? c & 7 : 8 + (c & 7), (exponent == 0 ? 1 : exponent) - 10 - 8);
}

// Low and high bytes of the 128 magnitudes, in two registers each.
template <bool Half, Kind kKind>
struct ByteTables {
  alignas(64) uint8_t low[128], high[128];
  constexpr ByteTables() : low(), high() {
    for (int c = 0; c < 128; ++c) {
      low[c] = static_cast<uint8_t>(code_bits<Half, kKind>(c));
      high[c] = static_cast<uint8_t>(code_bits<Half, kKind>(c) >> 8);
    }
  }
};

struct UnitPair {
  __m512i first, second;
};

// int8 and fp8: both bytes of the 16-bit values by table (vpermi2b looks up 128 bytes), interleaved.
template <bool Half, Kind kKind>
struct ByteDecoder {
  static constexpr ByteTables<Half, kKind> kTables{};
  const __m512i low0 = load(kTables.low), low1 = load(kTables.low + 64);
  const __m512i high0 = load(kTables.high), high1 = load(kTables.high + 64);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  // High byte of -128, whose magnitude has no place among 128.
  const __m512i lowest = _mm512_set1_epi8(static_cast<char>((exact_bits<Half>(128, 0) >> 8) | 0x80));

  UnitPair operator()(const uint8_t* values, int pair) const {
    const __m512i codes = load(values + kLine * pair);
    const __m512i index = kKind == Kind::kInt8 ? _mm512_abs_epi8(codes) : codes;
    const __m512i low = _mm512_permutex2var_epi8(low0, index, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, index, high1);
    high = _mm512_ternarylogic_epi64(high, codes, sign, 0xF8);  // high | (codes & sign)
    if (kKind == Kind::kInt8) high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(codes, sign), lowest);
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
};

}  // namespace
}  // namespace vllm_sparse
