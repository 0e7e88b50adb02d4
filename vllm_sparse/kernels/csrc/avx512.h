// AVX-512 loops shared by the levels with and without BF16/VBMI; each level supplies `Ops`.
#pragma once

#include <immintrin.h>

#include "gather.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// One pass over a slab for kP row pairs (of 4) and kT tokens, accumulators in registers. With two pairs a
// slab is read twice, so the caller keeps slabs cache-sized whenever tokens > 6.
template <class Ops, int kT, int kP>
void slab_tile(const uint8_t* packed, int64_t blocks, const uint16_t* x, bool fresh, float* acc) {
  const Ops ops;
  for (int first = 0; first < kPairs; first += kP) {
    __m512 sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + ((first + p) * kT + t) * kLanes);
      }
    }
    const uint8_t* block = packed;
    const uint16_t* chunk = x;
    for (int64_t b = 0; b < blocks; ++b, block += Ops::kBlockBytes) {
      for (int h = 0; h < 2; ++h, chunk += kChunk * kT) {
        typename Ops::Select select[kP];
        typename Ops::Values values[kP];
        for (int p = 0; p < kP; ++p) {
          const int unit = 2 * (first + p) + h;
          select[p] = ops.select(block + 8 * unit);
          values[p] = ops.values(block + kMetadataBytes + 64 * unit);
        }
        for (int t = 0; t < kT; ++t) {
          const __m512i xv = load(chunk + t * kChunk);
          for (int p = 0; p < kP; ++p) {
            sum[p][t] = ops.dot(sum[p][t], values[p], _mm512_shuffle_epi8(xv, select[p]));
          }
        }
      }
    }
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) _mm512_storeu_ps(acc + ((first + p) * kT + t) * kLanes, sum[p][t]);
    }
  }
}

// One token: one accumulator per unit, to cover the latency of the dot product.
template <class Ops>
void slab_single(const uint8_t* packed, int64_t blocks, const uint16_t* x, bool fresh, float* acc) {
  const Ops ops;
  __m512 sum[kUnits];
  for (int u = 0; u < kUnits; ++u) {
    sum[u] = fresh || u % 2 ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + (u / 2) * kLanes);
  }
  for (int64_t b = 0; b < blocks; ++b, packed += Ops::kBlockBytes, x += kBlockColumns) {
    const __m512i halves[2] = {load(x), load(x + kChunk)};
    for (int u = 0; u < kUnits; ++u) {
      const auto values = ops.values(packed + kMetadataBytes + 64 * u);
      sum[u] = ops.dot(sum[u], values, _mm512_shuffle_epi8(halves[u % 2], ops.select(packed + 8 * u)));
    }
  }
  for (int p = 0; p < kPairs; ++p) {
    _mm512_storeu_ps(acc + p * kLanes, _mm512_add_ps(sum[2 * p], sum[2 * p + 1]));
  }
}

template <class Ops>
void slab(const uint8_t* packed, int64_t blocks, const uint16_t* x, int tokens, bool fresh, float* acc) {
  switch (tokens) {
    case 1: return slab_single<Ops>(packed, blocks, x, fresh, acc);
    case 2: return slab_tile<Ops, 2, 4>(packed, blocks, x, fresh, acc);
    case 3: return slab_tile<Ops, 3, 4>(packed, blocks, x, fresh, acc);
    case 4: return slab_tile<Ops, 4, 4>(packed, blocks, x, fresh, acc);
    case 5: return slab_tile<Ops, 5, 4>(packed, blocks, x, fresh, acc);
    case 6: return slab_tile<Ops, 6, 2>(packed, blocks, x, fresh, acc);
    case 7: return slab_tile<Ops, 7, 2>(packed, blocks, x, fresh, acc);
    default: return slab_tile<Ops, 8, 2>(packed, blocks, x, fresh, acc);
  }
}

// Rows 0..7 of one token from raw accumulators whose 128-bit lanes belong to a pair's rows in turn (fp16).
inline __m256 reduce_wide(const float* acc, int64_t pair_stride) {
  __m256 a[kPairs];
  for (int p = 0; p < kPairs; ++p) {
    a[p] = _mm256_add_ps(_mm256_loadu_ps(acc + p * pair_stride), _mm256_loadu_ps(acc + p * pair_stride + 8));
  }
  const __m256 rows = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  return _mm256_permutevar8x32_ps(rows, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// The same where every lane holds two sums of each row of the pair (bf16).
inline __m256 reduce_narrow(const float* acc, int64_t pair_stride) {
  __m512 a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = _mm512_loadu_ps(acc + p * pair_stride);
  const __m512 low = _mm512_add_ps(_mm512_shuffle_ps(a[0], a[1], _MM_SHUFFLE(2, 0, 2, 0)),
                                   _mm512_shuffle_ps(a[0], a[1], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m512 high = _mm512_add_ps(_mm512_shuffle_ps(a[2], a[3], _MM_SHUFFLE(2, 0, 2, 0)),
                                    _mm512_shuffle_ps(a[2], a[3], _MM_SHUFFLE(3, 1, 3, 1)));
  const __m512 half = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, _MM_SHUFFLE(1, 0, 1, 0)),
                                    _mm512_shuffle_f32x4(low, high, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m512 rows = _mm512_add_ps(_mm512_shuffle_f32x4(half, half, _MM_SHUFFLE(2, 0, 2, 0)),
                                    _mm512_shuffle_f32x4(half, half, _MM_SHUFFLE(3, 1, 3, 1)));
  return _mm512_castps512_ps256(rows);
}

template <class Ops>
void store(const float* acc, int tokens, const Epilogue& out) {
  const __mmask8 rows = static_cast<__mmask8>((1u << out.rows) - 1u);
  const __m256 scale = out.scale == nullptr ? _mm256_set1_ps(1.0f) : _mm256_loadu_ps(out.scale);
  const __m256 bias = out.bias == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(out.bias);
  for (int t = 0; t < tokens; ++t) {
    const float* own = acc + t * kLanes;
    const int64_t pair_stride = int64_t{tokens} * kLanes;
    __m256 sum = Ops::kWide ? reduce_wide(own, pair_stride) : reduce_narrow(own, pair_stride);
    sum = _mm256_fmadd_ps(sum, scale, bias);
    _mm_mask_storeu_epi16(out.y + t * out.ldy, rows, Ops::round(sum));
  }
}

// fp16 has no dot product below AVX512-FP16: convert both sides and use two FMAs.
template <class Selector>
struct Fp16Ops : Selector {
  static constexpr int64_t kBlockBytes = block_bytes(Kind::kFp16);
  static constexpr bool kWide = true;
  using Select = __m512i;
  struct Values {
    __m512 low, high;
  };
  Values values(const uint8_t* p) const {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
            _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)))};
  }
  __m512 dot(__m512 sum, const Values& v, __m512i x) const {
    sum = _mm512_fmadd_ps(v.low, _mm512_cvtph_ps(_mm512_castsi512_si256(x)), sum);
    return _mm512_fmadd_ps(v.high, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)), sum);
  }
  static __m128i round(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

}  // namespace
}  // namespace vllm_sparse
