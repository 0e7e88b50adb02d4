// AVX2 + FMA + F16C: a unit is two halves of 2 rows x 16 columns, selected by in-lane byte shuffles.
#include <immintrin.h>

#include "decode.h"
#include "kernel.h"
#include "nibble_a8.h"

namespace vllm_sparse {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

// ---- Selections ----------------------------------------------------------------------------------------------

// AVX2 has no variable 16-bit shift: a multiplication moves code w to the top of word w, a shift brings it
// down, and another multiplication doubles it into both bytes.
struct WordSelector {
  __m256i spread, lift, base;
  WordSelector() {
    alignas(32) uint16_t sp[16], li[16], b[16];
    for (int w = 0; w < 16; ++w) {
      const int lane = w / 8;
      const int at = 8 * ((w % 4) / 2);
      sp[w] = static_cast<uint16_t>((2 * lane) | ((2 * lane + 1) << 8));
      li[w] = static_cast<uint16_t>(1 << (14 - 2 * (w % 8)));
      b[w] = static_cast<uint16_t>(at | ((at + 1) << 8));
    }
    spread = load(sp);
    lift = load(li);
    base = load(b);
  }
  __m256i select(const uint8_t* metadata) const {
    int32_t codes;
    std::memcpy(&codes, metadata, sizeof(codes));
    const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi32(codes), spread);
    const __m256i code = _mm256_srli_epi16(_mm256_mullo_epi16(words, lift), 14);
    return _mm256_or_si256(_mm256_mullo_epi16(code, _mm256_set1_epi16(0x0202)), base);
  }
};

// The 32 bytes of half a line of int8 values: 4 octets, each with the 16 code bits of its own. Code 2i of an
// octet goes to the low byte of its word i, code 2i + 1 to the high byte.
struct ByteSelector {
  __m256i spread[2], low, high, base;
  ByteSelector() {
    alignas(32) uint16_t sp[2][16], lo[16], hi[16];
    alignas(32) uint8_t b[32];
    for (int w = 0; w < 16; ++w) {
      for (int half = 0; half < 2; ++half) {
        const int octet = 4 * half + w / 4;
        const int at = 8 * (octet % 2) + 2 * (octet / 2);
        sp[half][w] = static_cast<uint16_t>(at | (at + 1) << 8);
      }
      lo[w] = static_cast<uint16_t>(1 << (14 - 4 * (w % 4)));
      hi[w] = static_cast<uint16_t>(1 << (12 - 4 * (w % 4)));
    }
    for (int i = 0; i < 32; ++i) b[i] = static_cast<uint8_t>(8 * (i / 8 % 2) + 4 * ((i % 4) / 2));
    spread[0] = load(sp[0]);
    spread[1] = load(sp[1]);
    low = load(lo);
    high = load(hi);
    base = load(b);
  }
  __m256i select(const uint8_t* metadata, int half) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata));
    const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), spread[half]);
    const __m256i even = _mm256_srli_epi16(_mm256_mullo_epi16(words, low), 14);
    const __m256i odd = _mm256_srli_epi16(_mm256_mullo_epi16(words, high), 14);
    return _mm256_or_si256(_mm256_or_si256(even, _mm256_slli_epi16(odd, 8)), base);
  }
};

// ---- Products ------------------------------------------------------------------------------------------------

struct Pair {
  __m256 first, second;
};

struct FloatAcc {
  using Acc = __m256;
  using Selector = WordSelector;
  static constexpr int kSteps = 2;
  static __m256i select(const Selector& s, const uint8_t* metadata, int half) {
    return s.select(metadata + 4 * half);
  }
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load_acc(const char* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static void store_acc(char* p, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(p), v); }
};

// bf16 to float is a move of 16 bits; even and odd words go to two vectors of the same lane order.
struct Bf16Ops : FloatAcc {
  static constexpr Kind kKind = Kind::kBf16;
  static Pair widen(__m256i v) {
    const __m256i high = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(high)};
  }
  static Pair values(const uint8_t* p) { return widen(load(p)); }
  static __m256 dot(__m256 sum, const Pair& v, __m256i x) {
    const Pair xs = widen(x);
    return _mm256_fmadd_ps(v.second, xs.second, _mm256_fmadd_ps(v.first, xs.first, sum));
  }
};

struct Fp16Ops : FloatAcc {
  static constexpr Kind kKind = Kind::kFp16;
  static Pair widen(__m256i v) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  }
  static Pair values(const uint8_t* p) { return widen(load(p)); }
  static __m256 dot(__m256 sum, const Pair& v, __m256i x) {
    const Pair xs = widen(x);
    return _mm256_fmadd_ps(v.second, xs.second, _mm256_fmadd_ps(v.first, xs.first, sum));
  }
};

struct IntPair {
  __m256i even, odd;  // 16-bit words
};

// vpmaddubsw would saturate (255 * 127 * 2), so widen to 16 bits.
struct Int8Ops {
  using Acc = __m256i;
  using Selector = ByteSelector;
  static constexpr Kind kKind = Kind::kInt8A8;
  static constexpr int kSteps = 1;
  static __m256i select(const Selector& s, const uint8_t* metadata, int half) { return s.select(metadata, half); }
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i load_acc(const char* p) { return load(p); }
  static void store_acc(char* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static IntPair values(const uint8_t* p) {
    const __m256i v = load(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static __m256i dot(__m256i sum, const IntPair& v, __m256i x) {
    const __m256i even = _mm256_madd_epi16(v.even, _mm256_and_si256(x, _mm256_set1_epi16(0xFF)));
    const __m256i odd = _mm256_madd_epi16(v.odd, _mm256_srli_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
};

// One pass for kP row pairs and kT of the slab's tokens, from token `from`. With one pair per pass a slab's
// units are still read once; only the metadata line is read four times.
template <class Ops, int kT, int kP>
void slab_tile(const Slab& slab, int from, char* acc) {
  constexpr int64_t kBytes = block_bytes(Ops::kKind);
  const typename Ops::Selector selector;
  const int64_t pair_stride = kLine * slab.tokens;
  for (int first = 0; first < kPairs; first += kP) {
    char* const sums = acc + (first * slab.tokens + from) * kLine;
    typename Ops::Acc sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = slab.fresh ? Ops::zero() : Ops::load_acc(sums + p * pair_stride + t * kLine);
      }
    }
    const uint8_t* block = slab.packed;
    const uint8_t* chunk = slab.x + from * kLine;
    for (int64_t b = 0; b < slab.blocks; ++b, block += kBytes) {
      if (slab.next != nullptr) prefetch_block<kPairs / kP>(slab.next + b * kBytes, kBytes, first / kP);
      for (int h = 0; h < Ops::kSteps; ++h, chunk += kLine * slab.tokens) {
        for (int p = 0; p < kP; ++p) {
          const int step = Ops::kSteps * (first + p) + h;
          for (int half = 0; half < 2; ++half) {
            const auto select = Ops::select(selector, block + 16 * (first + p) + 8 * h, half);
            const auto v = Ops::values(block + kMetadataBytes + kLine * step + 32 * half);
            for (int t = 0; t < kT; ++t) {
              const __m256i x = _mm256_shuffle_epi8(load(chunk + t * kLine + 32 * half), select);
              sum[p][t] = Ops::dot(sum[p][t], v, x);
            }
          }
        }
      }
    }
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
};

struct Fp16Float {
  static constexpr bool kWide = true;
  static __m128i round(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

template <class Float>
inline void store_rows(__m256 sum, const Epilogue& out, int token) {
  if (out.scale != nullptr) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(out.scale));
  if (out.bias != nullptr) sum = _mm256_add_ps(sum, _mm256_loadu_ps(out.bias));
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

// ---- Decoding ------------------------------------------------------------------------------------------------

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

}  // namespace

const Level kAvx2Level = {
    {slab<Bf16Ops>, store<Bf16Float>, gather<false>, decode<Lanes<Bf16Float>>, slab<Int8Ops>, store_a8<Bf16Float>,
     quantize<false>, slab_a4<slab<Int8Ops>, 8>, store_a4<false, 8>, nullptr},
    {slab<Fp16Ops>, store<Fp16Float>, gather<true>, decode<Lanes<Fp16Float>>, slab<Int8Ops>, store_a8<Fp16Float>,
     quantize<true>, slab_a4<slab<Int8Ops>, 8>, store_a4<true, 8>, nullptr},
};

}  // namespace vllm_sparse
