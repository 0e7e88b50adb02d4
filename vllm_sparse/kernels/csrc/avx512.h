// AVX-512 loops shared by the levels with and without BF16/VBMI/VNNI. `Ops` describes one kind of product:
//   kKind, kSteps          packed kind; steps per block (2 units of 32 columns, or one line of 64 bytes)
//   kWide                  whether a row owns whole 128-bit lanes of an accumulator
//   Acc, zero/load/store   accumulator register
//   Select select(p)       metadata at p to a permute control
//   Values values(p)       a unit's values, as the product wants them
//   permute(select, x)     the activations that the values multiply; x is a pointer to a 64-byte chunk
//   dot(sum, values, x)
#pragma once

#include <immintrin.h>

#include "constant.h"
#include "decode.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// The value is made here, once, and lies in a register.
template <class Vector>
inline void keep_here(Vector& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#else
  asm volatile("" : "+m"(v));  // where the instructions are emulated
#endif
}

template <class T, class Element>
constexpr Constant<64, T, Element> constant(Element element) {
  return Constant<64, T, Element>(element);
}

// First of the four columns (within a chunk of 32) that value w of a 16-bit unit may come from.
constexpr auto kFirstColumn = constant<uint16_t>([](int w) { return 8 * (w / 8) + 4 * ((w % 4) / 2); });

// One pass over a slab for kP row pairs (of 4) and kT tokens, accumulators in registers. Selections are decoded
// one step ahead: decoded where they are needed they stall the permutes. With fewer than four pairs a slab is
// passed over several times, so the caller keeps slabs cache-sized.
template <class Ops, int kT, int kP>
void slab_tile(const Slab& slab, void* accumulators) {
  constexpr int64_t kBytes = block_bytes(Ops::kKind);
  constexpr int kSteps = Ops::kSteps;
  const Ops ops;
  char* const acc = static_cast<char*>(accumulators);
  for (int first = 0; first < kPairs; first += kP) {
    typename Ops::Acc sum[kP][kT];
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) {
        sum[p][t] = slab.fresh ? Ops::zero() : Ops::load_acc(acc + ((first + p) * kT + t) * kLine);
      }
    }
    const uint8_t* block = slab.packed;
    const uint8_t* const last = block + (slab.blocks - 1) * kBytes;
    const uint8_t* next = slab.next;
    const uint8_t* chunk = slab.x;
    typename Ops::Select select[kP];
    for (int p = 0; p < kP; ++p) select[p] = ops.select(block + 16 * (first + p));
    for (; block <= last; block += kBytes) {
      if (next != nullptr) {
        prefetch_block<kPairs / kP>(next, kBytes, first / kP);
        next += kBytes;
      }
      const uint8_t* following = block < last ? block + kBytes : block;
      for (int h = 0; h < kSteps; ++h, chunk += kLine * kT) {
        typename Ops::Values values[kP];
        typename Ops::Select ahead[kP];
        for (int p = 0; p < kP; ++p) {
          const int pair = first + p;
          ahead[p] = ops.select(h + 1 < kSteps ? block + 16 * pair + 8 : following + 16 * pair);
          keep_here(ahead[p]);  // the compiler would sink it to its use
          values[p] = ops.values(block + kMetadataBytes + kLine * (kSteps * pair + h));
        }
        for (int t = 0; t < kT; ++t) {
          for (int p = 0; p < kP; ++p) {
            sum[p][t] = ops.dot(sum[p][t], values[p], ops.permute(select[p], chunk + t * kLine));
          }
        }
        for (int p = 0; p < kP; ++p) select[p] = ahead[p];
      }
    }
    for (int p = 0; p < kP; ++p) {
      for (int t = 0; t < kT; ++t) Ops::store_acc(acc + ((first + p) * kT + t) * kLine, sum[p][t]);
    }
  }
}

// One token: an accumulator per pair and step parity, to cover the latency of the dot product. No prefetching:
// at this rate the hardware's streams reach the memory's limit by themselves.
template <class Ops>
void slab_single(const Slab& slab, void* accumulators) {
  constexpr int64_t kBytes = block_bytes(Ops::kKind);
  const Ops ops;
  char* const acc = static_cast<char*>(accumulators);
  typename Ops::Acc sum[kPairs][Ops::kSteps];
  for (int p = 0; p < kPairs; ++p) {
    for (int h = 0; h < Ops::kSteps; ++h) {
      sum[p][h] = slab.fresh || h > 0 ? Ops::zero() : Ops::load_acc(acc + p * kLine);
    }
  }
  const uint8_t* block = slab.packed;
  const uint8_t* x = slab.x;
  for (int64_t b = 0; b < slab.blocks; ++b, block += kBytes, x += kLine * Ops::kSteps) {
    for (int p = 0; p < kPairs; ++p) {
      for (int h = 0; h < Ops::kSteps; ++h) {
        const auto values = ops.values(block + kMetadataBytes + kLine * (Ops::kSteps * p + h));
        const auto select = ops.select(block + 16 * p + 8 * h);
        sum[p][h] = ops.dot(sum[p][h], values, ops.permute(select, x + kLine * h));
      }
    }
  }
  for (int p = 0; p < kPairs; ++p) {
    auto total = sum[p][0];
    for (int h = 1; h < Ops::kSteps; ++h) total = Ops::add(total, sum[p][h]);
    Ops::store_acc(acc + p * kLine, total);
  }
}

template <class Ops>
void slab(const Slab& slab, void* accumulators) {
  static constexpr SlabFn kTiles[kMaxTile] = {
      slab_single<Ops>,      slab_tile<Ops, 2, 4>,  slab_tile<Ops, 3, 4>,  slab_tile<Ops, 4, 4>,
      slab_tile<Ops, 5, 4>,  slab_tile<Ops, 6, 2>,  slab_tile<Ops, 7, 2>,  slab_tile<Ops, 8, 2>,
      slab_tile<Ops, 9, 1>,  slab_tile<Ops, 10, 1>, slab_tile<Ops, 11, 1>, slab_tile<Ops, 12, 1>,
      slab_tile<Ops, 13, 1>, slab_tile<Ops, 14, 1>, slab_tile<Ops, 15, 1>, slab_tile<Ops, 16, 1>,
  };
  kTiles[slab.tokens - 1](slab, accumulators);
}

// ---- Accumulators to rows ------------------------------------------------------------------------------------

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

// int32 sums in which rows alternate.
inline __m256i reduce_a8(const int32_t* acc, int64_t pair_stride) {
  __m512i a[kPairs];
  for (int p = 0; p < kPairs; ++p) a[p] = load(acc + p * pair_stride);
  const __m512i low = _mm512_add_epi32(_mm512_unpacklo_epi64(a[0], a[1]), _mm512_unpackhi_epi64(a[0], a[1]));
  const __m512i high = _mm512_add_epi32(_mm512_unpacklo_epi64(a[2], a[3]), _mm512_unpackhi_epi64(a[2], a[3]));
  const __m512i half = _mm512_add_epi32(_mm512_shuffle_i32x4(low, high, _MM_SHUFFLE(1, 0, 1, 0)),
                                        _mm512_shuffle_i32x4(low, high, _MM_SHUFFLE(3, 2, 3, 2)));
  const __m512i rows = _mm512_add_epi32(_mm512_shuffle_i32x4(half, half, _MM_SHUFFLE(2, 0, 2, 0)),
                                        _mm512_shuffle_i32x4(half, half, _MM_SHUFFLE(3, 1, 3, 1)));
  return _mm512_castsi512_si256(rows);
}

inline __mmask8 row_mask(const Epilogue& out) { return static_cast<__mmask8>((1u << out.rows) - 1u); }

inline __m256 scaled(__m256 sum, const Epilogue& out) {
  if (out.scale != nullptr) sum = _mm256_mul_ps(sum, _mm256_loadu_ps(out.scale));
  return out.bias == nullptr ? sum : _mm256_add_ps(sum, _mm256_loadu_ps(out.bias));
}

template <class Float>
inline void store_rows(__m256 sum, const Epilogue& out, int token) {
  _mm_mask_storeu_epi16(out.y + token * out.ldy, row_mask(out), Float::round(scaled(sum, out)));
}

template <class Float>
void store(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const int64_t pair_stride = int64_t{tokens} * kLanes;
    store_rows<Float>(Float::kWide ? reduce_wide(acc, pair_stride) : reduce_narrow(acc, pair_stride), out, t);
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

// ---- Products and conversions --------------------------------------------------------------------------------

struct FloatAcc {
  using Acc = __m512;
  static constexpr int kSteps = 2;
  using Select = __m512i;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load_acc(const void* p) { return _mm512_loadu_ps(p); }
  static void store_acc(void* p, __m512 v) { _mm512_storeu_ps(p, v); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512i permute(__m512i select, const uint8_t* x) { return _mm512_permutexvar_epi16(select, load(x)); }
};

struct IntAcc {
  using Acc = __m512i;
  static constexpr Kind kKind = Kind::kInt8A8;
  static constexpr int kSteps = 1;
  using Select = __m512i;
  static __m512i zero() { return _mm512_setzero_si512(); }
  static __m512i load_acc(const void* p) { return load(p); }
  static void store_acc(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
};

// fp16 has no dot product below AVX512-FP16: convert both sides and use two FMAs.
template <class Selector>
struct Fp16Ops : FloatAcc, Selector {
  static constexpr Kind kKind = Kind::kFp16;
  struct Values {
    __m512 low, high;
  };
  static Values widen(__m512i v) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(v)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(v, 1))};
  }
  static Values values(const uint8_t* p) { return widen(load(p)); }
  __m512 dot(__m512 sum, const Values& v, __m512i x) const {
    sum = _mm512_fmadd_ps(v.low, _mm512_cvtph_ps(_mm512_castsi512_si256(x)), sum);
    return _mm512_fmadd_ps(v.high, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)), sum);
  }
};

struct Fp16Float {
  static constexpr bool kWide = true;
  static __m128i round(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i round(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

template <class Float>
struct Lanes {
  using Vector = __m512;
  static constexpr int kWidth = 16;
  static __m128i octets(const uint8_t* p) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16)));
  }
  static __m512 int8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(octets(p))); }
  static __m512 fp8(const uint8_t* p) {
    const __m256i words = _mm256_cvtepu8_epi16(octets(p));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0x7F)), 7);
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
  }
  static __m512 int4(const uint8_t* unit, int at) {
    // Octet L: bytes 2L, 2L+1 hold its first four values, 8+2L, 8+2L+1 the others; two octets at a time.
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i from = _mm_add_epi8(order, _mm_set1_epi8(static_cast<char>(at / 4)));
    const __m128i bytes = _mm_shuffle_epi8(load128(unit), from);
    const __m128i fifteen = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(bytes, fifteen);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), fifteen);
    const __m128i eight = _mm_set1_epi8(8);
    const __m128i values = _mm_sub_epi8(_mm_xor_si128(_mm_unpacklo_epi8(low, high), eight), eight);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values));
  }
  static __m512 rows(float first, float second, int) {
    return _mm512_mask_mov_ps(_mm512_set1_ps(first), 0xF0F0, _mm512_set1_ps(second));
  }
  static __m512 multiply(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
  static void store(__m512 v, uint16_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), Float::round(v));
  }
};

}  // namespace
}  // namespace vllm_sparse
