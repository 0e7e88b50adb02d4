// Products with int8, fp8 and int4 weights for AVX2, decoded to floats in registers. Scales of groups are multiplied in
// as float32 here, and not rounded to 16 bits as where a slab is decoded.
#pragma once

#include "avx2.h"
#include "group_runs.h"

namespace vllm_sparse {
namespace {

// Half a line of bytes has octets of two units in turn. Those of unit kUnit to the tops of dwords: even groups or odd.
template <int kUnit, int kOdd>
constexpr auto kByteDwords = constant<uint8_t>([](int b) {
  return b % 4 == 3 ? 8 * kUnit + slot_word(b / 4) + 2 * kOdd : 0x80;
});
// To the tops of words: in each lane even groups, then odd ones.
template <int kUnit>
constexpr auto kByteWords = constant<uint8_t>([](int b) {
  const int word = b % 16 / 2;
  return b % 2 ? 8 * kUnit + slot_word(word % 4) + 2 * (word / 4) : 0x80;
});

// The scales of a block's units.
class UnitScales {
 public:
  explicit UnitScales(const Slab& slab) : runs_(slab) {}
  // Numbers of unit 2 * pair + half, whose rows alternate, times their scales.
  Pair scaled(const Pair& v, int unit) const {
    const auto* rows = reinterpret_cast<const double*>(runs_.scales(unit % 2) + unit / 2 * 2);
    const __m256 scales = _mm256_castpd_ps(_mm256_broadcast_sd(rows));
    return {_mm256_mul_ps(v.first, scales), _mm256_mul_ps(v.second, scales)};
  }
  void end_block() { runs_.advance(1); }

 private:
  GroupRuns runs_;
};

// Where all is scaled at the end.
struct NoScales {
  explicit NoScales(const Slab&) {}
  static Pair scaled(const Pair& v, int) { return v; }
  void end_block() {}
};

template <Kind kBytes, class Scales>
class ByteOps : public FloatOps {
 public:
  static constexpr Kind kKind = kBytes;
  explicit ByteOps(const Slab& slab) : FloatOps(slab), scales_(slab) {}
  Pair values(const uint8_t* values, int step, int half) const {
    const __m256i line = load(values + kLine * (step / 2) + 32 * half);
    return scales_.scaled(step % 2 == 0 ? unit<0>(line) : unit<1>(line), step);
  }
  void end_block() { scales_.end_block(); }

 private:
  template <int kUnit>
  static Pair unit(__m256i line) {
    if constexpr (kKind == Kind::kInt8) {
      return {integers(line, load(kByteDwords<kUnit, 0>.of)), integers(line, load(kByteDwords<kUnit, 1>.of))};
    } else {
      return numbers(_mm256_shuffle_epi8(line, load(kByteWords<kUnit>.of)));
    }
  }
  static __m256 integers(__m256i line, __m256i place) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_shuffle_epi8(line, place), 24));
  }
  // A byte at the top of a word is a float16 but for one bit that its exponent lacks, and 1/256 of its number.
  static Pair numbers(__m256i words) {
    const __m256i size = _mm256_srli_epi16(_mm256_slli_epi16(words, 1), 2);
    const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
    return widen_halves(_mm256_or_si256(size, sign));
  }

  Scales scales_;
};

// A byte of a unit is a group of one row: its first slot in the low nibble, its second in the high one. Bytes of half
// kHalf's two octets to the tops of dwords.
template <int kHalf, int kOdd>
constexpr auto kNibbleDwords = constant<uint8_t>([](int b) {
  return b % 4 == 3 ? 8 * (b / 4 % 2) + 2 * (2 * kHalf + b / 16) + kOdd : 0x80;
});
// Low nibbles, 8 above their number, and high ones, which have its sign: as parts of an integer, and to its number.
constexpr auto kNibbleMask = constant<uint32_t>([](int d) { return d % 4 < 2 ? 0x0F000000u : 0xF0000000u; });
constexpr auto kNibbleUnit = constant<float>([](int d) { return d % 4 < 2 ? 0x1p-24f : 0x1p-28f; });
constexpr auto kNibbleZero = constant<float>([](int d) { return d % 4 < 2 ? -8.0f : 0.0f; });

template <class Scales>
class NibbleOps : public FloatOps {
 public:
  static constexpr Kind kKind = Kind::kInt4;
  explicit NibbleOps(const Slab& slab) : FloatOps(slab), scales_(slab) {}
  Pair values(const uint8_t* values, int step, int half) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + unit_bytes(kKind) * step));
    const __m256i unit = _mm256_xor_si256(_mm256_broadcastsi128_si256(bytes), _mm256_set1_epi8(8));
    return scales_.scaled(half == 0 ? groups<0>(unit) : groups<1>(unit), step);
  }
  void end_block() { scales_.end_block(); }

 private:
  template <int kHalf>
  static Pair groups(__m256i unit) {
    return {numbers(unit, load(kNibbleDwords<kHalf, 0>.of)), numbers(unit, load(kNibbleDwords<kHalf, 1>.of))};
  }
  static __m256 numbers(__m256i unit, __m256i place) {
    const __m256i parts = _mm256_and_si256(_mm256_shuffle_epi8(unit, place), load(kNibbleMask.of));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(parts), _mm256_load_ps(kNibbleUnit.of), _mm256_load_ps(kNibbleZero.of));
  }

  Scales scales_;
};

template <class Scales>
void direct_slab(Kind kind, const Slab& bytes, void* accumulators) {
  switch (kind) {
    case Kind::kInt4: return slab<NibbleOps<Scales>>(bytes, accumulators);
    case Kind::kInt8: return slab<ByteOps<Kind::kInt8, Scales>>(bytes, accumulators);
    default: return slab<ByteOps<Kind::kFp8, Scales>>(bytes, accumulators);
  }
}

inline void direct(const Decode& d, const uint8_t* x, int tokens, bool fresh, void* accumulators) {
  const Slab bytes{d.packed, d.next, d.blocks, x, tokens, fresh, d.scales, d.group, d.first};
  d.scales == nullptr ? direct_slab<NoScales>(d.kind, bytes, accumulators)
                      : direct_slab<UnitScales>(d.kind, bytes, accumulators);
}

// Measured on Zen 3: from nine tokens on a slab is passed twice, and only int8 is decoded fast enough for that.
inline int direct_tokens(Kind kind, bool) { return kind == Kind::kInt8 ? kMaxTile : kMaxTile / 2; }

}  // namespace
}  // namespace vllm_sparse
