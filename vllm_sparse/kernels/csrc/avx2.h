// Selections, products and reductions of AVX2 + FMA + F16C: a unit is two halves of 2 rows x 16 columns.
//
// 16-bit numbers are multiplied as float32, to which the activations are widened once for all weights. A group of four
// columns is a 128-bit lane then, which a permutation by the low two bits of each dword selects from: a code needs
// nothing but a shift. Bytes are selected by in-lane byte shuffles.
#pragma once

#include <immintrin.h>

#include <algorithm>

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

// Dword d of a vector belongs to row d mod 2, slot d / 2 mod 2 and octet d / 4 of half a unit; one vector has the even
// groups of the octets and another the odd ones.
constexpr int slot_word(int d) { return 4 * (d % 2) + d % 4 / 2; }
constexpr auto kEvenCodes = constant<uint32_t>([](int d) { return 2 * (8 * (d / 4) + slot_word(d)); });
constexpr auto kOddCodes = constant<uint32_t>([](int d) { return 2 * (8 * (d / 4) + slot_word(d) + 2); });

struct FloatSelector {
  const __m256i even = load(kEvenCodes.of), odd = load(kOddCodes.of);
  Selection select(const uint8_t* metadata) const {
    const __m256i codes = metadata_word(metadata);
    return {_mm256_srlv_epi32(codes, even), _mm256_srlv_epi32(codes, odd)};
  }
};

// AVX2 has no variable 16-bit shift: a multiplication moves a code to the top of its word, a shift brings it down.

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

// For products of 2:4 weights those of even groups, then of odd ones, in the order of a selection.
struct Pair {
  __m256 first, second;
};

struct FloatOps {
  explicit FloatOps(const Slab&) {}
  void end_block() {}
  using Acc = __m256;
  using Selector = FloatSelector;
  static constexpr int kSteps = 2;
  static constexpr int64_t kTokenBytes = kWideChunk, kHalfBytes = kWideChunk / 2;  // of activations
  static Selection select(const Selector& s, const uint8_t* metadata, int half) {
    return s.select(metadata + 4 * half);
  }
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load_acc(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store_acc(char* p, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
  static __m256 dot(__m256 sum, const Pair& v, const uint8_t* x, const Selection& selection) {
    const float* const columns = reinterpret_cast<const float*>(x);
    const __m256 first = _mm256_permutevar_ps(_mm256_loadu_ps(columns), selection.first);
    const __m256 second = _mm256_permutevar_ps(_mm256_loadu_ps(columns + 8), selection.second);
    return _mm256_fmadd_ps(v.second, second, _mm256_fmadd_ps(v.first, first, sum));
  }
};

// Words of an octet to the tops of dwords: bf16 to float is a move of 16 bits.
template <int kOdd>
constexpr auto kDwordTops = constant<uint16_t>([](int w) {
  const int word = slot_word(w / 2) + 2 * kOdd;
  return w % 2 ? 2 * word | (2 * word + 1) << 8 : 0x8080;
});

struct Bf16Ops : FloatOps {
  using FloatOps::FloatOps;
  static constexpr Kind kKind = Kind::kBf16;
  static Pair values(const uint8_t* values, int step, int half) {
    const __m256i v = load(values + kLine * step + 32 * half);
    return {_mm256_castsi256_ps(_mm256_shuffle_epi8(v, load(kDwordTops<0>.of))),
            _mm256_castsi256_ps(_mm256_shuffle_epi8(v, load(kDwordTops<1>.of)))};
  }
};

// float16 numbers of which each lane has even groups in its lower half and odd ones in its upper.
inline Pair widen_halves(__m256i v) {
  const __m256i apart = _mm256_permute4x64_epi64(v, 0xD8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(apart)), _mm256_cvtph_ps(_mm256_extracti128_si256(apart, 1))};
}

// Words of an octet: even groups, then odd ones.
constexpr auto kGroupWords = constant<uint16_t>([](int w) {
  const int word = slot_word(w % 4) + 2 * (w % 8 / 4);
  return 2 * word | (2 * word + 1) << 8;
});

struct Fp16Ops : FloatOps {
  using FloatOps::FloatOps;
  static constexpr Kind kKind = Kind::kFp16;
  static Pair values(const uint8_t* values, int step, int half) {
    return widen_halves(_mm256_shuffle_epi8(load(values + kLine * step + 32 * half), load(kGroupWords.of)));
  }
};

struct IntPair {
  __m256i first, second;  // 16-bit words
};

// vpmaddubsw would saturate (255 * 127 * 2), so widen to 16 bits.
struct Int8Ops {
  explicit Int8Ops(const Slab&) {}
  void end_block() {}
  using Acc = __m256i;
  using Selector = ByteSelector;
  static constexpr Kind kKind = Kind::kInt8A8;
  static constexpr int kSteps = 1;
  static constexpr int64_t kTokenBytes = kLine, kHalfBytes = kLine / 2;
  static Selection select(const Selector& s, const uint8_t* metadata, int half) { return s.select(metadata, half); }
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i load_acc(const char* p) { return load(p); }
  static void store_acc(char* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static IntPair values(const uint8_t* values, int step, int half) {
    const __m256i v = load(values + kLine * step + 32 * half);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static __m256i dot(__m256i sum, const IntPair& v, const uint8_t* x, const Selection& selection) {
    const __m256i columns = load(x);
    const __m256i first = _mm256_madd_epi16(v.first, _mm256_shuffle_epi8(columns, selection.first));
    const __m256i second = _mm256_madd_epi16(v.second, _mm256_shuffle_epi8(columns, selection.second));
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
      : ops_(slab), first_(first), stride_(Ops::kTokenBytes * slab.tokens), block_(slab.packed), next_(slab.next),
        chunk_(slab.x + from * Ops::kTokenBytes) {}

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
      ops_.end_block();
    }
  }

 private:
  static constexpr int64_t kBytes = block_bytes(Ops::kKind);
  // Known to the compiler where there is one pass.
  int first() const { return kP == kPairs ? 0 : first_; }
  static constexpr int kHalves = 2 * kP * Ops::kSteps;  // of units in a block: steps, then pairs, then halves

  auto select(const uint8_t* block, int i) const {
    return Ops::select(selector_, block + 16 * (first() + i / 2 % kP) + 8 * (i / 2 / kP), i % 2);
  }
  void prefetch() {
    if (next_ == nullptr) return;
    prefetch_block<kPairs / kP>(next_, kBytes, first() / kP);
    next_ += kBytes;
  }
  template <class Selection>
  void multiply(int i, const Selection& selection, Acc (&sum)[kT]) const {
    const int half = i % 2, step = Ops::kSteps * (first() + i / 2 % kP) + i / 2 / kP;
    const auto v = ops_.values(block_ + kMetadataBytes, step, half);
    const uint8_t* const x = chunk_ + stride_ * (i / 2 / kP) + Ops::kHalfBytes * half;
    for (int t = 0; t < kT; ++t) {
      sum[t] = Ops::dot(sum[t], v, x + t * Ops::kTokenBytes, selection);
      in_order(sum[t]);
    }
  }

  Ops ops_;
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

// ---- Activations ---------------------------------------------------------------------------------------------

// 8 columns, as float.
template <bool Half>
inline __m256 widen(const uint16_t* x) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  if constexpr (Half) return _mm256_cvtph_ps(v);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// Copies a tile to [chunk][tokens][32 floats], zero beyond K: for each two octets the even groups, then the odd ones.
template <bool Half>
bool gather_wide(const Tile& tile, uint8_t* target) {
  bool special = false;
  const int64_t chunks = ceil_div(tile.k, kBlockColumns) * (kBlockColumns / kChunk);
  for (int t = 0; t < tile.tokens; ++t) {
    const uint16_t* row = tile.x + t * tile.k;
    special |= largest_magnitude(row, tile.k) >= kExponentMask<Half>;
    if (target == nullptr) continue;
    float* to = reinterpret_cast<float*>(target + t * kWideChunk);
    for (int64_t c = 0; c < chunks; ++c, to += tile.tokens * kChunk) {
      const int64_t left = tile.k - c * kChunk;
      uint16_t last[kChunk] = {};
      const uint16_t* from = row + c * kChunk;
      if (left < kChunk) from = static_cast<const uint16_t*>(std::memcpy(last, from, std::max<int64_t>(left, 0) * 2));
      for (int64_t at = 0; at < kChunk; at += 16) {
        const __m256 first = widen<Half>(from + at), second = widen<Half>(from + at + 8);
        _mm256_storeu_ps(to + at, _mm256_permute2f128_ps(first, second, 0x20));
        _mm256_storeu_ps(to + at + 8, _mm256_permute2f128_ps(first, second, 0x31));
      }
    }
  }
  return special;
}

// ---- Accumulators to rows ------------------------------------------------------------------------------------

inline __m256 join(__m256 low, __m256 high) {
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
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
inline __m256 reduce(const float* acc, int64_t pair_stride) {
  __m256d a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = _mm256_castps_pd(_mm256_loadu_ps(acc + p * pair_stride));
  const auto of_pairs = [](__m256d a, __m256d b) {
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  };
  return join(of_pairs(a[0], a[1]), of_pairs(a[2], a[3]));
}

struct Bf16Float {
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
    store_rows<Float>(reduce(acc, int64_t{tokens} * kLanes), out, t);
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
