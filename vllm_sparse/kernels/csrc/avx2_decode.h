// Decoding for AVX2: 8-bit and 4-bit values to 16 bits in memory.
#pragma once

#include "avx2.h"
#include "decode.h"
#include "group_runs.h"

namespace vllm_sparse {
namespace {

template <class Float>
struct Lanes {
  using Vector = __m256;
  static constexpr int kWidth = 8;
  static __m256 int8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p))); }
  static __m256 fp8(const uint8_t* p) {
    const __m128i words = _mm_cvtepu8_epi16(load64(p));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(words, _mm_set1_epi16(0x7F)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(sign, rest));
  }
  static __m256 int4(const uint8_t* unit, int at) {
    // Octet L: bytes 2L, 2L+1 hold its first four values, 8+2L, 8+2L+1 the others.
    uint16_t quads[2];
    std::memcpy(&quads[0], unit + at / 4, 2);
    std::memcpy(&quads[1], unit + 8 + at / 4, 2);
    const __m128i bytes = _mm_cvtsi32_si128(quads[0] | quads[1] << 16);
    const __m128i fifteen = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, fifteen);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen);
    const __m128i eight = _mm_set1_epi8(8);
    const __m128i values = _mm_sub_epi8(_mm_xor_si128(_mm_unpacklo_epi8(low, high), eight), eight);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(values));
  }
  static __m256 rows(float first, float second, int) {
    return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
  }
  static __m256 multiply(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
  static void store(__m256 v, uint16_t* out) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), Float::round(v));
  }
};

// Bytes of 16 nibbles of either row of a pair: row 2p in the lower lane, row 2p + 1 in the upper.
inline __m256i nibbles_of_rows(const uint8_t* unit) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(unit));
  const __m128i fifteen = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, fifteen);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen);
  return _mm256_set_m128i(_mm_unpackhi_epi8(low, high), _mm_unpacklo_epi8(low, high));
}

// What the 16 int4 numbers of either row become in 16 bits: a byte shuffle each for the low and the high bytes.
template <class Float>
struct NibbleTable {
  __m256i low, high;

  // Rounding does not look at signs: eight products give all sixteen.
  void build(const float* scales) {
    // Where the low byte of number n's size lies: nowhere for 0, size - 1 for 1 to 7, and for 8 to 15, which stand for
    // -8 to -1.
    const __m128i place = _mm_setr_epi8(-128, 0, 2, 4, 6, 8, 10, 12, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m128i next = _mm_setr_epi8(0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1);
    const __m128i sign = _mm_setr_epi32(0, 0, static_cast<int>(0x80808080u), static_cast<int>(0x80808080u));
    const __m256 sizes = _mm256_setr_ps(1, 2, 3, 4, 5, 6, 7, 8);
    __m128i lows[2], highs[2];
    for (int row = 0; row < 2; ++row) {
      const __m128i words = Float::round(_mm256_mul_ps(sizes, _mm256_set1_ps(scales[row])));
      lows[row] = _mm_shuffle_epi8(words, place);
      highs[row] = _mm_xor_si128(_mm_shuffle_epi8(words, _mm_or_si128(place, next)), sign);
    }
    low = _mm256_set_m128i(lows[1], lows[0]);
    high = _mm256_set_m128i(highs[1], highs[0]);
  }

  // Both halves of a unit: quads of the rows in turn.
  void look_up(const uint8_t* unit, __m256i (&words)[2]) const {
    const __m256i nibbles = nibbles_of_rows(unit);
    const __m256i lows = _mm256_shuffle_epi8(low, nibbles), highs = _mm256_shuffle_epi8(high, nibbles);
    words[0] = _mm256_permute4x64_epi64(_mm256_unpacklo_epi8(lows, highs), 0xD8);
    words[1] = _mm256_permute4x64_epi64(_mm256_unpackhi_epi8(lows, highs), 0xD8);
  }
};

// Int4 numbers times their scales. A table lasts as long as the scales of its pair of rows.
template <class Float>
class NibbleDecoder {
 public:
  explicit NibbleDecoder(const Decode& d) : runs_(slab_of(d)) {}
  // The words of unit 2 * pair + half, in its two halves of 16 values.
  void words(const uint8_t* values, int pair, int half, __m256i (&out)[2]) {
    static constexpr float kOnes[2] = {1.0f, 1.0f};
    const float* scales = runs_.scales(half);
    const float* const wanted = scales == nullptr ? kOnes : scales + 2 * pair;
    if (wanted != current_[pair]) tables_[pair].build(wanted);
    current_[pair] = wanted;
    tables_[pair].look_up(values + (2 * pair + half) * unit_bytes(Kind::kInt4), out);
  }
  void end_block() { runs_.advance(1); }

 private:
  static Slab slab_of(const Decode& d) {
    Slab slab{};
    slab.scales = d.scales;
    slab.group = d.group;
    slab.first = d.first;
    return slab;
  }

  NibbleTable<Float> tables_[kPairs];
  const float* current_[kPairs] = {};
  GroupRuns runs_;
};

inline void prefetch_next(const Decode& d, int64_t b) {
  const int64_t bytes = block_bytes(d.kind);
  if (d.next != nullptr) prefetch_block<1>(d.next + b * bytes, bytes, 0);
}

template <class Float>
void decode_int4(const Decode& d) {
  NibbleDecoder<Float> decoder(d);
  const uint8_t* block = d.packed;
  uint8_t* out = d.out;
  for (int64_t b = 0; b < d.blocks; ++b, block += block_bytes(Kind::kInt4), out += kWideBlockBytes) {
    prefetch_next(d, b);
    std::memcpy(out, block, kMetadataBytes);
    for (int u = 0; u < kUnits; ++u) {
      __m256i words[2];
      decoder.words(block + kMetadataBytes, u / 2, u % 2, words);
      auto* const to = reinterpret_cast<__m256i*>(out + kMetadataBytes + u * kLine);
      _mm256_storeu_si256(to, words[0]);
      _mm256_storeu_si256(to + 1, words[1]);
    }
    decoder.end_block();
  }
}

// int8 and fp8 numbers without scales, which 16 bits hold exactly.
template <class Float, Kind kKind>
void decode_bytes(const Decode& d) {
  const uint8_t* block = d.packed;
  uint8_t* target = d.out;
  for (int64_t b = 0; b < d.blocks; ++b, block += block_bytes(kKind), target += kWideBlockBytes) {
    prefetch_next(d, b);
    std::memcpy(target, block, kMetadataBytes);
    const uint8_t* values = block + kMetadataBytes;
    uint8_t* out = target + kMetadataBytes;
    for (int pair = 0; pair < kPairs; ++pair, out += 2 * kLine) {
      for (int octet = 0; octet < 4; ++octet, values += 16) {
        const __m256 first = decode_values<Lanes<Float>, kKind>(values, 0, 0);
        const __m256 second = decode_values<Lanes<Float>, kKind>(values, 1, 0);
        const __m256i both = Float::exact(first, second);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * octet), _mm256_castsi256_si128(both));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kLine + 16 * octet), _mm256_extracti128_si256(both, 1));
      }
    }
  }
}

template <class Float>
void decode_fast(const Decode& d) {
  if (d.kind == Kind::kInt4) return decode_int4<Float>(d);
  if (d.scales != nullptr) return decode<Lanes<Float>>(d);
  if (d.kind == Kind::kInt8) return decode_bytes<Float, Kind::kInt8>(d);
  decode_bytes<Float, Kind::kFp8>(d);
}

}  // namespace
}  // namespace vllm_sparse
