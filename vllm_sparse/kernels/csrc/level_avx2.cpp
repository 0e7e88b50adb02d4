// AVX2 + FMA + F16C: a unit is two halves of 2 rows x 16 columns, selected by in-lane byte shuffles.
#include <immintrin.h>

#include "gather.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// AVX2 has no variable 16-bit shift: a multiplication moves code w to the top of word w, a shift brings it
// down, and another multiplication doubles it into both bytes.
struct Selector {
  __m256i spread, lift, base;
  Selector() {
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

struct Pair {
  __m256 first, second;
};

// bf16 to float is a move of 16 bits; even and odd words go to two vectors of the same lane order.
struct Bf16Ops {
  static constexpr int64_t kBlockBytes = block_bytes(Kind::kBf16);
  static constexpr bool kHalf = false;
  static Pair widen(__m256i v) {
    const __m256i high = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(high)};
  }
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

struct Fp16Ops {
  static constexpr int64_t kBlockBytes = block_bytes(Kind::kFp16);
  static constexpr bool kHalf = true;
  static Pair widen(__m256i v) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  }
  static __m128i round(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// One pass for kP row pairs and kT of the slab's tokens, from token `from`. With one pair per pass a slab's
// units are still read once; only the metadata line is read four times.
template <class Ops, int kT, int kP>
void slab_tile(const Slab& slab, int from, float* acc) {
  const Selector selector;
  const int64_t stride = kChunk * slab.tokens;
  for (int first = 0; first < kPairs; first += kP) {
    float* const sums = acc + (first * slab.tokens + from) * kLanes;
    const int64_t pair_stride = int64_t{kLanes} * slab.tokens;
    __m256 sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = slab.fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + p * pair_stride + t * kLanes);
      }
    }
    const uint8_t* block = slab.packed;
    const uint16_t* chunk = slab.x + from * kChunk;
    for (int64_t b = 0; b < slab.blocks; ++b, block += Ops::kBlockBytes) {
      if (slab.next != nullptr) prefetch_block<kPairs / kP>(slab.next + b * Ops::kBlockBytes, first / kP);
      for (int h = 0; h < 2; ++h, chunk += stride) {
        for (int p = 0; p < kP; ++p) {
          const int unit = 2 * (first + p) + h;
          for (int half = 0; half < 2; ++half) {
            const __m256i select = selector.select(block + 8 * unit + 4 * half);
            const Pair v = Ops::widen(load(block + kMetadataBytes + 64 * unit + 32 * half));
            for (int t = 0; t < kT; ++t) {
              const Pair xs = Ops::widen(_mm256_shuffle_epi8(load(chunk + t * kChunk + 16 * half), select));
              sum[p][t] = _mm256_fmadd_ps(v.first, xs.first, sum[p][t]);
              sum[p][t] = _mm256_fmadd_ps(v.second, xs.second, sum[p][t]);
            }
          }
        }
      }
    }
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) _mm256_storeu_ps(sums + p * pair_stride + t * kLanes, sum[p][t]);
    }
  }
}

// Sixteen registers hold at most eight accumulators beside the operands: larger tiles take two passes.
template <class Ops>
void slab(const Slab& slab, float* acc) {
  using TileFn = void (*)(const Slab&, int, float*);
  static constexpr int kMost = 8;
  static constexpr TileFn kTiles[kMost] = {
      slab_tile<Ops, 1, 4>, slab_tile<Ops, 2, 4>, slab_tile<Ops, 3, 2>, slab_tile<Ops, 4, 2>,
      slab_tile<Ops, 5, 1>, slab_tile<Ops, 6, 1>, slab_tile<Ops, 7, 1>, slab_tile<Ops, 8, 1>,
  };
  for (int from = 0; from < slab.tokens; from += kMost) {
    const int tokens = slab.tokens - from < kMost ? slab.tokens - from : kMost;
    kTiles[tokens - 1](slab, from, acc);
  }
}

// Rows 0..7 of one token. fp16: the lanes of a sum are the pair's two rows; bf16: each lane holds two sums of
// either row.
template <bool kHalf>
inline __m256 reduce(const float* acc, int64_t pair_stride) {
  __m256 a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = _mm256_loadu_ps(acc + p * pair_stride);
  const __m256 low = _mm256_hadd_ps(a[0], a[1]);
  const __m256 high = _mm256_hadd_ps(a[2], a[3]);
  if (kHalf) {
    const __m256 rows = _mm256_hadd_ps(low, high);
    return _mm256_permutevar8x32_ps(rows, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

template <class Ops>
void store(const float* acc, int tokens, const Epilogue& out) {
  const __m256 scale = out.scale == nullptr ? _mm256_set1_ps(1.0f) : _mm256_loadu_ps(out.scale);
  const __m256 bias = out.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(out.bias);
  for (int t = 0; t < tokens; ++t) {
    const __m256 sum = reduce<Ops::kHalf>(acc + t * kLanes, int64_t{tokens} * kLanes);
    const __m128i rounded = Ops::round(_mm256_fmadd_ps(sum, scale, bias));
    uint16_t* y = out.y + t * out.ldy;
    if (out.rows == kPanelRows) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y), rounded);
    } else {
      alignas(16) uint16_t rows[kPanelRows];
      _mm_store_si128(reinterpret_cast<__m128i*>(rows), rounded);
      std::memcpy(y, rows, out.rows * sizeof(uint16_t));
    }
  }
}

}  // namespace

const KernelTable kAvx2Kernels = {
    {slab<Bf16Ops>, store<Bf16Ops>, gather_tile<false>},
    {slab<Fp16Ops>, store<Fp16Ops>, gather_tile<true>},
};

}  // namespace vllm_sparse
