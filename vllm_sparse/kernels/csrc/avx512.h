// AVX-512 loops shared by the levels with and without BF16/VBMI; each level supplies `Ops`: how a metadata
// qword becomes word indices (select), how a unit's values are held (values) and multiplied (dot).
#pragma once

#include <immintrin.h>

#include "gather.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }

// A constant of 32 words, computed by `Word`.
template <class Word>
struct Words {
  alignas(64) uint16_t of[32];
  constexpr explicit Words(Word word) : of() {
    for (int w = 0; w < 32; ++w) of[w] = static_cast<uint16_t>(word(w));
  }
};

// First of the four columns (within a chunk of 32) that value w may come from.
constexpr int first_column(int w) { return 8 * (w / 8) + 4 * ((w % 4) / 2); }
constexpr Words kFirstColumn([](int w) { return first_column(w); });

// One pass over a slab for kP row pairs (of 4) and kT tokens, accumulators in registers. Selections are decoded
// one step ahead: decoded where they are needed they stall the permutes. With fewer than four pairs a slab is
// passed over several times, so the caller keeps slabs cache-sized.
template <class Ops, int kT, int kP>
void slab_tile(const Slab& slab, float* acc) {
  const Ops ops;
  for (int first = 0; first < kPairs; first += kP) {
    __m512 sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = slab.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + ((first + p) * kT + t) * kLanes);
      }
    }
    const uint8_t* block = slab.packed;
    const uint8_t* const last = block + (slab.blocks - 1) * Ops::kBlockBytes;
    const uint8_t* next = slab.next;
    const uint16_t* chunk = slab.x;
    __m512i select[kP];
    for (int p = 0; p < kP; ++p) select[p] = ops.select(block + 16 * (first + p));
    for (; block <= last; block += Ops::kBlockBytes) {
      if (next != nullptr) {
        prefetch_block<kPairs / kP>(next, first / kP);
        next += Ops::kBlockBytes;
      }
      const uint8_t* following = block < last ? block + Ops::kBlockBytes : block;
      for (int h = 0; h < 2; ++h, chunk += kChunk * kT) {
        typename Ops::Values values[kP];
        __m512i ahead[kP];
        for (int p = 0; p < kP; ++p) {
          const int unit = 2 * (first + p);
          ahead[p] = ops.select(h == 0 ? block + 8 * (unit + 1) : following + 8 * unit);
          asm volatile("" : "+v"(ahead[p]));  // keep it here; the compiler would sink it to its use
          values[p] = ops.values(block + kMetadataBytes + 64 * (unit + h));
        }
        for (int t = 0; t < kT; ++t) {
          for (int p = 0; p < kP; ++p) {
            const __m512i xs = _mm512_permutexvar_epi16(select[p], load(chunk + t * kChunk));
            sum[p][t] = ops.dot(sum[p][t], values[p], xs);
          }
        }
        for (int p = 0; p < kP; ++p) select[p] = ahead[p];
      }
    }
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) _mm512_storeu_ps(acc + ((first + p) * kT + t) * kLanes, sum[p][t]);
    }
  }
}

// One token: one accumulator per unit, to cover the latency of the dot product. No prefetching: at this rate
// the hardware's streams reach the memory's limit by themselves.
template <class Ops>
void slab_single(const Slab& slab, float* acc) {
  const Ops ops;
  __m512 sum[kUnits];
  for (int u = 0; u < kUnits; ++u) {
    sum[u] = slab.fresh || u % 2 ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + (u / 2) * kLanes);
  }
  const uint8_t* block = slab.packed;
  const uint16_t* x = slab.x;
  for (int64_t b = 0; b < slab.blocks; ++b, block += Ops::kBlockBytes, x += kBlockColumns) {
    const __m512i halves[2] = {load(x), load(x + kChunk)};
    for (int u = 0; u < kUnits; ++u) {
      const auto values = ops.values(block + kMetadataBytes + 64 * u);
      sum[u] = ops.dot(sum[u], values, _mm512_permutexvar_epi16(ops.select(block + 8 * u), halves[u % 2]));
    }
  }
  for (int p = 0; p < kPairs; ++p) {
    _mm512_storeu_ps(acc + p * kLanes, _mm512_add_ps(sum[2 * p], sum[2 * p + 1]));
  }
}

template <class Ops>
void slab(const Slab& slab, float* acc) {
  static constexpr SlabFn kTiles[kMaxTile] = {
      slab_single<Ops>,      slab_tile<Ops, 2, 4>,  slab_tile<Ops, 3, 4>,  slab_tile<Ops, 4, 4>,
      slab_tile<Ops, 5, 4>,  slab_tile<Ops, 6, 2>,  slab_tile<Ops, 7, 2>,  slab_tile<Ops, 8, 2>,
      slab_tile<Ops, 9, 1>,  slab_tile<Ops, 10, 1>, slab_tile<Ops, 11, 1>, slab_tile<Ops, 12, 1>,
      slab_tile<Ops, 13, 1>, slab_tile<Ops, 14, 1>, slab_tile<Ops, 15, 1>, slab_tile<Ops, 16, 1>,
  };
  kTiles[slab.tokens - 1](slab, acc);
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
