// Selections, products and reductions of AVX2 + FMA + F16C: a unit is two halves of 2 rows x 16 columns, selected by
// in-lane byte shuffles. What selects the first slots of all groups and what selects the second ones are two controls:
// they place the numbers where the products want them, so that nothing is left to mask or shift for each token.
#pragma once

#include <immintrin.h>

#include "activations.h"
#include "constant.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// ---- Selections ----------------------------------------------------------------------------------------------

template <class T, class Element>
constexpr Constant<32, T, Element> constant(Element element) {
  return Constant<32, T, Element>(element);
}

struct Selection {
  __m256i first, second;
};

inline __m256i metadata_word(const uint8_t* metadata) {
  int32_t codes;
  std::memcpy(&codes, metadata, sizeof(codes));
  return _mm256_set1_epi32(codes);
}

// The 8 groups of half a unit of bf16 values are 8 nibbles, one for each dword of a vector. A nibble looks up where
// its two numbers lie among the 8 columns of its lane; they go to the top of the dword, zeros below them: as floats.
constexpr auto kNibbleSpread = constant<uint8_t>([](int b) { return 2 * (b / 16) + b % 16 / 8; });
constexpr auto kNibbleShift = constant<uint32_t>([](int d) { return d % 2 * 4; });
constexpr auto kFirstByte = constant<uint8_t>([](int b) { return 2 * (b % 4); });
constexpr auto kSecondByte = constant<uint8_t>([](int b) { return 2 * (b % 16 / 4); });
constexpr auto kTopBase = constant<uint8_t>([](int b) { return b % 4 < 2 ? 0x80 : b / 4 % 2 * 8 + b % 2; });

struct FloatSelector {
  const __m256i spread = load(kNibbleSpread.of), shift = load(kNibbleShift.of), base = load(kTopBase.of);
  const __m256i first = load(kFirstByte.of), second = load(kSecondByte.of);
  Selection select(const uint8_t* metadata) const {
    const __m256i bytes = _mm256_shuffle_epi8(metadata_word(metadata), spread);
    const __m256i nibbles = _mm256_and_si256(_mm256_srlv_epi32(bytes, shift), _mm256_set1_epi8(15));
    return {_mm256_or_si256(_mm256_shuffle_epi8(first, nibbles), base),
            _mm256_or_si256(_mm256_shuffle_epi8(second, nibbles), base)};
  }
};

// AVX2 has no variable 16-bit shift: a multiplication moves a code to the top of its word, a shift brings it down.

// The conversion of float16 wants words next to each other: both slots by one control.
constexpr auto kWordSpread = constant<uint16_t>([](int w) { return 2 * (w / 8) | (2 * (w / 8) + 1) << 8; });
constexpr auto kWordLift = constant<uint16_t>([](int w) { return 1 << (14 - 2 * (w % 8)); });
constexpr auto kWordBase = constant<uint16_t>([](int w) { return 8 * (w % 4 / 2) | (8 * (w % 4 / 2) + 1) << 8; });

struct WordCodes {
  const __m256i spread = load(kWordSpread.of), lift = load(kWordLift.of);
  // The codes of half a unit, a word each.
  __m256i codes(const uint8_t* metadata) const {
    const __m256i words = _mm256_shuffle_epi8(metadata_word(metadata), spread);
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, lift), 14);
  }
};

struct WordSelector : WordCodes {
  const __m256i base = load(kWordBase.of);
  __m256i select(const uint8_t* metadata) const {
    return _mm256_or_si256(_mm256_mullo_epi16(codes(metadata), _mm256_set1_epi16(0x0202)), base);
  }
};

// The 32 bytes of half a line of int8 values: 4 octets, each with the 16 code bits of its own. Selected bytes are the
// low ones of words.
template <int kHalf>
constexpr auto kOctetSpread = constant<uint16_t>([](int w) {
  const int octet = 4 * kHalf + w / 4;
  const int at = 8 * (octet % 2) + 2 * (octet / 2);
  return at | (at + 1) << 8;
});
constexpr auto kFirstLift = constant<uint16_t>([](int w) { return 1 << (14 - 4 * (w % 4)); });
constexpr auto kSecondLift = constant<uint16_t>([](int w) { return 1 << (12 - 4 * (w % 4)); });
constexpr auto kLowBase = constant<uint16_t>([](int w) { return 0x8000 | (8 * (w / 4 % 2) + 4 * (w % 2)); });

struct ByteSelector {
  const __m256i spread[2] = {load(kOctetSpread<0>.of), load(kOctetSpread<1>.of)};
  const __m256i first = load(kFirstLift.of), second = load(kSecondLift.of), base = load(kLowBase.of);
  Selection select(const uint8_t* metadata, int half) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata));
    const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), spread[half]);
    return {_mm256_or_si256(_mm256_srli_epi16(_mm256_mullo_epi16(words, first), 14), base),
            _mm256_or_si256(_mm256_srli_epi16(_mm256_mullo_epi16(words, second), 14), base)};
  }
};

// ---- Products ------------------------------------------------------------------------------------------------

struct Pair {
  __m256 first, second;
};

template <class AnySelector>
struct FloatAcc {
  using Acc = __m256;
  using Selector = AnySelector;
  static constexpr int kSteps = 2;
  static auto select(const Selector& s, const uint8_t* metadata, int half) { return s.select(metadata + 4 * half); }
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load_acc(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store_acc(char* p, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
};

// bf16 to float is a move of 16 bits; even and odd words, which are first and second slots, go to two vectors.
struct Bf16Ops : FloatAcc<FloatSelector> {
  static constexpr Kind kKind = Kind::kBf16;
  static Pair widen(__m256i v) {
    const __m256i high = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(high)};
  }
  static Pair values(const uint8_t* values, int step, int half) {
    return widen(load(values + kLine * step + 32 * half));
  }
  static __m256 dot(__m256 sum, const Pair& v, __m256i x, const Selection& selection) {
    const __m256 first = _mm256_castsi256_ps(_mm256_shuffle_epi8(x, selection.first));
    const __m256 second = _mm256_castsi256_ps(_mm256_shuffle_epi8(x, selection.second));
    return _mm256_fmadd_ps(v.second, second, _mm256_fmadd_ps(v.first, first, sum));
  }
};

struct Fp16Ops : FloatAcc<WordSelector> {
  static constexpr Kind kKind = Kind::kFp16;
  static Pair widen(__m256i v) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  }
  static Pair values(const uint8_t* values, int step, int half) {
    return widen(load(values + kLine * step + 32 * half));
  }
  static __m256 dot(__m256 sum, const Pair& v, __m256i x, __m256i selection) {
    const Pair xs = widen(_mm256_shuffle_epi8(x, selection));
    return _mm256_fmadd_ps(v.second, xs.second, _mm256_fmadd_ps(v.first, xs.first, sum));
  }
};

struct IntPair {
  __m256i first, second;  // 16-bit words
};

// vpmaddubsw would saturate (255 * 127 * 2), so widen to 16 bits.
struct Int8Ops {
  using Acc = __m256i;
  using Selector = ByteSelector;
  static constexpr Kind kKind = Kind::kInt8A8;
  static constexpr int kSteps = 1;
  static Selection select(const Selector& s, const uint8_t* metadata, int half) { return s.select(metadata, half); }
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i load_acc(const char* p) { return load(p); }
  static void store_acc(char* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static IntPair values(const uint8_t* values, int step, int half) {
    const __m256i v = load(values + kLine * step + 32 * half);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static __m256i dot(__m256i sum, const IntPair& v, __m256i x, const Selection& selection) {
    const __m256i first = _mm256_madd_epi16(v.first, _mm256_shuffle_epi8(x, selection.first));
    const __m256i second = _mm256_madd_epi16(v.second, _mm256_shuffle_epi8(x, selection.second));
    return _mm256_add_epi32(sum, _mm256_add_epi32(first, second));
  }
};

// Keeps GCC from bringing forward what later tokens need, for which there are no registers.
template <class Acc>
inline void in_order(Acc& sum) {
  __asm__ volatile("" : "+x"(sum));
}

// kT of a slab's tokens, from token `from` on, times kP row pairs, from pair `first` on; block by block.
template <class Ops, int kT, int kP>
class TileRun {
 public:
  using Acc = typename Ops::Acc;
  TileRun(const Slab& slab, int from, int first)
      : first_(first), stride_(kLine * slab.tokens), block_(slab.packed), next_(slab.next),
        chunk_(slab.x + from * kLine) {}

  // Adds the products of `blocks` blocks and stands behind them then. `last`: the slab ends there.
  void add(int64_t blocks, bool last, Acc (&sum)[kP][kT]) {
    // A selection takes longer than the products that hide it: it is made one half ahead.
    auto ahead = select(block_, 0);
    for (int64_t b = 0; b < blocks; ++b, block_ += kBytes, chunk_ += stride_ * Ops::kSteps) {
      prefetch();
      const uint8_t* const following = last && b + 1 == blocks ? block_ : block_ + kBytes;
#pragma GCC unroll 16
      for (int i = 0; i < kHalves; ++i) {
        const auto selection = ahead;
        ahead = i + 1 < kHalves ? select(block_, i + 1) : select(following, 0);
        multiply(i, selection, sum[i / 2 % kP]);
      }
    }
  }

 private:
  static constexpr int64_t kBytes = block_bytes(Ops::kKind);
  static constexpr int kHalves = 2 * kP * Ops::kSteps;  // of units in a block: steps, then pairs, then halves

  auto select(const uint8_t* block, int i) const {
    return Ops::select(selector_, block + 16 * (first_ + i / 2 % kP) + 8 * (i / 2 / kP), i % 2);
  }
  void prefetch() {
    if (next_ == nullptr) return;
    prefetch_block<kPairs / kP>(next_, kBytes, first_ / kP);
    next_ += kBytes;
  }
  template <class Selection>
  void multiply(int i, const Selection& selection, Acc (&sum)[kT]) const {
    const int half = i % 2, step = Ops::kSteps * (first_ + i / 2 % kP) + i / 2 / kP;
    const auto v = Ops::values(block_ + kMetadataBytes, step, half);
    const uint8_t* const x = chunk_ + stride_ * (i / 2 / kP) + 32 * half;
    for (int t = 0; t < kT; ++t) {
      sum[t] = Ops::dot(sum[t], v, load(x + t * kLine), selection);
      in_order(sum[t]);
    }
  }

  const typename Ops::Selector selector_;
  const int first_;
  const int64_t stride_;  // from one chunk to the next
  const uint8_t* block_;
  const uint8_t* next_;
  const uint8_t* chunk_;
};

// One pass for kP row pairs and kT of the slab's tokens, from token `from`. With one pair per pass a slab's
// units are still read once; only the metadata line is read four times.
template <class Ops, int kT, int kP>
void slab_tile(const Slab& slab, int from, char* acc) {
  const int64_t pair_stride = kLine * slab.tokens;
  for (int first = 0; first < kPairs; first += kP) {
    char* const sums = acc + (first * slab.tokens + from) * kLine;
    typename Ops::Acc sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = slab.fresh ? Ops::zero() : Ops::load_acc(sums + p * pair_stride + t * kLine);
      }
    }
    TileRun<Ops, kT, kP>(slab, from, first).add(slab.blocks, true, sum);
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) Ops::store_acc(sums + p * pair_stride + t * kLine, sum[p][t]);
    }
  }
}

// Sixteen registers hold at most eight accumulators beside the operands: larger tiles take two passes.
template <class Ops>
void slab(const Slab& slab, void* accumulators) {
  using TileFn = void (*)(const Slab&, int, char*);
  static constexpr int kMost = 8;
  static constexpr TileFn kTiles[kMost] = {
      slab_tile<Ops, 1, 4>, slab_tile<Ops, 2, 4>, slab_tile<Ops, 3, 2>, slab_tile<Ops, 4, 2>,
      slab_tile<Ops, 5, 1>, slab_tile<Ops, 6, 1>, slab_tile<Ops, 7, 1>, slab_tile<Ops, 8, 1>,
  };
  for (int from = 0; from < slab.tokens; from += kMost) {
    const int tokens = slab.tokens - from < kMost ? slab.tokens - from : kMost;
    kTiles[tokens - 1](slab, from, static_cast<char*>(accumulators));
  }
}

// ---- Accumulators to rows ------------------------------------------------------------------------------------

inline __m256 join(__m256 low, __m256 high) {
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// Rows 0..7 of one token. fp16: the lanes of a sum are the pair's two rows; bf16: each lane holds two sums of
// either row.
template <bool kWide>
inline __m256 reduce(const float* acc, int64_t pair_stride) {
  __m256 a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = _mm256_loadu_ps(acc + p * pair_stride);
  const __m256 low = _mm256_hadd_ps(a[0], a[1]);
  const __m256 high = _mm256_hadd_ps(a[2], a[3]);
  if (!kWide) return join(low, high);
  return _mm256_permutevar8x32_ps(_mm256_hadd_ps(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// int32 sums in which rows alternate.
inline __m256i reduce_a8(const int32_t* acc, int64_t pair_stride) {
  __m256i a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = load(acc + p * pair_stride);
  const __m256i low = _mm256_add_epi32(_mm256_unpacklo_epi64(a[0], a[1]), _mm256_unpackhi_epi64(a[0], a[1]));
  const __m256i high = _mm256_add_epi32(_mm256_unpacklo_epi64(a[2], a[3]), _mm256_unpackhi_epi64(a[2], a[3]));
  return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

// float32 sums in which rows alternate.
inline __m256 reduce_a4(const float* acc, int64_t pair_stride) {
  __m256d a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = _mm256_castps_pd(_mm256_loadu_ps(acc + p * pair_stride));
  const auto of_pairs = [](__m256d a, __m256d b) {
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  return join(of_pairs(a[0], a[1]), of_pairs(a[2], a[3]));
}

struct Bf16Float {
  static constexpr bool kWide = false;
  static __m128i round(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    const __m256i top = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
  }
  // Numbers of at most 8 significant bits, the first vector's in the lower lane.
  static __m256i exact(__m256 first, __m256 second) {
    const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(first), 16);
    const __m256i b = _mm256_srli_epi32(_mm256_castps_si256(second), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
  }
};

struct Fp16Float {
  static constexpr bool kWide = true;
  static __m128i round(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i exact(__m256 first, __m256 second) { return _mm256_set_m128i(round(second), round(first)); }
};

inline __m256 scaled(__m256 sum, const Epilogue& out) {
  if (out.scale != nullptr) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(out.scale));
  return out.bias != nullptr ? _mm256_add_ps(sum, _mm256_loadu_ps(out.bias)) : sum;
}

template <class Float>
inline void store_rows(__m256 sum, const Epilogue& out, int token) {
  sum = scaled(sum, out);
  alignas(16) uint16_t rows[kPanelRows];
  _mm_store_si128(reinterpret_cast<__m128i*>(rows), Float::round(sum));
  std::memcpy(out.y + token * out.ldy, rows, out.rows * sizeof(uint16_t));
}

template <class Float>
void store(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    store_rows<Float>(reduce<Float::kWide>(acc, int64_t{tokens} * kLanes), out, t);
  }
}

template <class Float>
void store_a8(const void* accumulators, int tokens, const Epilogue& out) {
  const int32_t* acc = static_cast<const int32_t*>(accumulators);
  const __m256i correction = _mm256_cvtps_epi32(_mm256_loadu_ps(out.correction));
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256i sum = _mm256_sub_epi32(reduce_a8(acc, int64_t{tokens} * kLanes), correction);
    store_rows<Float>(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(out.token_scale[t])), out, t);
  }
}

}  // namespace
}  // namespace vllm_sparse
