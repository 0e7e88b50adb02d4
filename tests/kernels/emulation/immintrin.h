// AVX-512 (F, BW, VL, VBMI, VBMI2, VNNI, BF16) in plain C++, for processors that have AVX2 only.
//
// The kernels are in namespace vllm_sparse, so that its functions below hide the intrinsics of the same names.
// Semantics follow the "Operation" sections of Intel's Software Developer's Manual and Instruction Set Extensions
// reference. Found in place of the compiler's header by its folder's place among the include paths.
#pragma once

#include_next <immintrin.h>

#if defined(__AVX512F__)
#error "to be compiled without AVX-512: see compiler.py"
#endif

// Macros in GCC's header.
#undef _mm256_dpwssd_epi32

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace vllm_sparse {
namespace emulated {

template <class T, class V>
using Elements = std::array<T, sizeof(V) / sizeof(T)>;

template <class T, class V>
inline Elements<T, V> split(const V& v) {
  Elements<T, V> elements;
  std::memcpy(elements.data(), &v, sizeof(v));
  return elements;
}

template <class V, class Array>
inline V join(const Array& elements) {
  static_assert(sizeof(V) == sizeof(elements));
  V v;
  std::memcpy(&v, elements.data(), sizeof(v));
  return v;
}

// Element i of the result, of type T, is `element(i)`.
template <class V, class T, class Element>
inline V each(Element element) {
  Elements<T, V> result;
  for (int i = 0; i < static_cast<int>(result.size()); ++i) result[i] = static_cast<T>(element(i));
  return join<V>(result);
}

// The same on each of the 256-bit halves, by an instruction that AVX2 has.
template <class V, class Half, class Operation, class... Vectors>
inline V halves(Operation operation, const Vectors&... vectors) {
  return join<V>(std::array{operation(split<Half>(vectors)[0]...), operation(split<Half>(vectors)[1]...)});
}

// Denormal operands and results are zeros of their sign, whatever MXCSR says.
inline float flushed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::bit_cast<float>(bits & (bits & 0x7F800000 ? 0xFFFFFFFF : 0x80000000));
}

inline float of_bf16(uint16_t bits) { return flushed(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16)); }

// A product of two bf16 has 16 significant bits: exact, so that a fused operation rounds once.
inline float add_product(float sum, uint16_t a, uint16_t b) {
  return flushed(std::fma(of_bf16(a), of_bf16(b), flushed(sum)));
}

inline uint16_t to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(flushed(x));
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// VDPBF16PS: odd elements first.
template <class V, class Pairs>
inline V dot_bf16(V sum, Pairs a, Pairs b) {
  const auto s = split<float>(sum);
  const auto x = split<uint16_t>(a), y = split<uint16_t>(b);
  return each<V, float>([&](int i) {
    return add_product(add_product(s[i], x[2 * i + 1], y[2 * i + 1]), x[2 * i], y[2 * i]);
  });
}

template <class V, class T, class Mask>
inline V expanded(Mask mask, V v) {
  const auto x = split<T>(v);
  int from = 0;
  return each<V, T>([&](int i) { return mask >> i & 1 ? x[from++] : T{0}; });
}

template <class V, class T, class Mask>
inline V compressed(Mask mask, V v) {
  const auto x = split<T>(v);
  Elements<T, V> result{};
  int to = 0;
  for (int i = 0; i < static_cast<int>(x.size()); ++i) {
    if (mask >> i & 1) result[to++] = x[i];
  }
  return join<V>(result);
}

template <class V, class T, class Mask>
inline V blended(V otherwise, Mask mask, V v) {
  const auto a = split<T>(otherwise), b = split<T>(v);
  return each<V, T>([&](int i) { return mask >> i & 1 ? b[i] : a[i]; });
}

template <class T, class Mask, class V>
inline void store_some(void* to, Mask mask, V v) {
  const auto x = split<T>(v);
  for (int i = 0; i < static_cast<int>(x.size()); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + i * sizeof(T), &x[i], sizeof(T));
  }
}

template <class Mask, class T, class V, class Condition>
inline Mask mask_of(V v, Condition condition) {
  const auto x = split<T>(v);
  Mask mask = 0;
  for (int i = 0; i < static_cast<int>(x.size()); ++i) mask |= static_cast<Mask>(Mask{condition(x[i])} << i);
  return mask;
}

// Lanes 0 and 1 of the result are lanes of `a`, 2 and 3 of `b`.
template <class V>
inline V shuffled_lanes(V a, V b, int control) {
  const auto x = split<__m128i>(a), y = split<__m128i>(b);
  const std::array<__m128i, 4> result = {x[control & 3], x[control >> 2 & 3], y[control >> 4 & 3], y[control >> 6 & 3]};
  return join<V>(result);
}

// Eight signed bytes to dwords.
inline __m256i widened_bytes(int64_t bytes) { return _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)); }

}  // namespace emulated

// ---- Moving whole registers -----------------------------------------------------------------------------------

inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline __m512 _mm512_loadu_ps(const void* p) { return reinterpret_cast<__m512>(_mm512_loadu_si512(p)); }
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof(v)); }
inline void _mm512_store_si512(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(v) != 0) {
    std::fputs("emulated AVX-512: an aligned store to an address that is not\n", stderr);
    std::abort();
  }
  std::memcpy(p, &v, sizeof(v));
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  return emulated::each<__m512, float>([&](int i) {
    float x = 0;
    if (mask >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + 4 * i, sizeof(x));
    return x;
  });
}
inline void _mm_mask_storeu_epi16(void* p, __mmask8 mask, __m128i v) { emulated::store_some<uint16_t>(p, mask, v); }
inline void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) { emulated::store_some<uint16_t>(p, mask, v); }
inline void _mm256_mask_storeu_ps(void* p, __mmask8 mask, __m256 v) { emulated::store_some<float>(p, mask, v); }

inline __m512i _mm512_setzero_si512() { return __m512i{}; }
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_set1_epi8(char x) { return emulated::each<__m512i, char>([=](int) { return x; }); }
inline __m512i _mm512_set1_epi16(short x) { return emulated::each<__m512i, short>([=](int) { return x; }); }
inline __m512i _mm512_set1_epi32(int x) { return emulated::each<__m512i, int>([=](int) { return x; }); }
inline __m512i _mm512_set1_epi64(long long x) { return emulated::each<__m512i, long long>([=](int) { return x; }); }
inline __m512 _mm512_set1_ps(float x) { return emulated::each<__m512, float>([=](int) { return x; }); }
inline __m512i _mm512_broadcast_i64x2(__m128i v) { return emulated::each<__m512i, __m128i>([=](int) { return v; }); }

inline __m512 _mm512_castsi512_ps(__m512i v) { return reinterpret_cast<__m512>(v); }
inline __m512i _mm512_castps_si512(__m512 v) { return reinterpret_cast<__m512i>(v); }
inline __m256i _mm512_castsi512_si256(__m512i v) { return emulated::split<__m256i>(v)[0]; }
inline __m256 _mm512_castps512_ps256(__m512 v) { return emulated::split<__m256>(v)[0]; }
// The upper half is undefined: something that no kernel may come to depend on.
inline __m512i _mm512_castsi256_si512(__m256i v) {
  return emulated::join<__m512i>(std::array<__m256i, 2>{v, _mm256_set1_epi8(0x5A)});
}
inline __m512 _mm512_castps256_ps512(__m256 v) {
  return emulated::join<__m512>(std::array<__m256, 2>{v, _mm256_set1_ps(NAN)});
}
inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) { return emulated::split<__m256i>(v)[half & 1]; }
inline __m512i _mm512_inserti64x4(__m512i v, __m256i part, int half) {
  auto parts = emulated::split<__m256i>(v);
  parts[half & 1] = part;
  return emulated::join<__m512i>(parts);
}
inline __m512 _mm512_insertf32x8(__m512 v, __m256 part, int half) {
  auto parts = emulated::split<__m256>(v);
  parts[half & 1] = part;
  return emulated::join<__m512>(parts);
}

// ---- What AVX2 does to either half ----------------------------------------------------------------------------

#define VLLM_SPARSE_BY_HALVES(vector, name, half, narrow)                                            \
  template <class... Vectors>                                                                        \
  inline vector name(const Vectors&... vectors) {                                                    \
    return emulated::halves<vector, half>([](const auto&... v) { return narrow(v...); }, vectors...); \
  }

VLLM_SPARSE_BY_HALVES(__m512, _mm512_add_ps, __m256, _mm256_add_ps)
VLLM_SPARSE_BY_HALVES(__m512, _mm512_sub_ps, __m256, _mm256_sub_ps)
VLLM_SPARSE_BY_HALVES(__m512, _mm512_mul_ps, __m256, _mm256_mul_ps)
VLLM_SPARSE_BY_HALVES(__m512, _mm512_fmadd_ps, __m256, _mm256_fmadd_ps)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_add_epi8, __m256i, _mm256_add_epi8)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_add_epi32, __m256i, _mm256_add_epi32)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_sub_epi32, __m256i, _mm256_sub_epi32)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_madd_epi16, __m256i, _mm256_madd_epi16)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_abs_epi8, __m256i, _mm256_abs_epi8)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_and_si512, __m256i, _mm256_and_si256)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_or_si512, __m256i, _mm256_or_si256)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_shuffle_epi8, __m256i, _mm256_shuffle_epi8)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpacklo_epi8, __m256i, _mm256_unpacklo_epi8)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpackhi_epi8, __m256i, _mm256_unpackhi_epi8)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpacklo_epi32, __m256i, _mm256_unpacklo_epi32)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpackhi_epi32, __m256i, _mm256_unpackhi_epi32)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpacklo_epi64, __m256i, _mm256_unpacklo_epi64)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_unpackhi_epi64, __m256i, _mm256_unpackhi_epi64)
VLLM_SPARSE_BY_HALVES(__m512, _mm512_cvtepi32_ps, __m256i, _mm256_cvtepi32_ps)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_cvtps_epi32, __m256, _mm256_cvtps_epi32)
VLLM_SPARSE_BY_HALVES(__m512, _mm512_cvtph_ps, __m128i, _mm256_cvtph_ps)
VLLM_SPARSE_BY_HALVES(__m512i, _mm512_cvtepi8_epi32, int64_t, emulated::widened_bytes)
#undef VLLM_SPARSE_BY_HALVES

inline __m256i _mm512_cvtps_ph(__m512 v, int) {
  return emulated::halves<__m256i, __m256>([](__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }, v);
}
inline __m512i _mm512_slli_epi16(__m512i v, int count) {
  return emulated::halves<__m512i, __m256i>([=](__m256i x) { return _mm256_slli_epi16(x, count); }, v);
}
inline __m512i _mm512_srli_epi16(__m512i v, int count) {
  return emulated::halves<__m512i, __m256i>([=](__m256i x) { return _mm256_srli_epi16(x, count); }, v);
}
inline __m512i _mm512_srai_epi16(__m512i v, int count) {
  return emulated::halves<__m512i, __m256i>([=](__m256i x) { return _mm256_srai_epi16(x, count); }, v);
}
inline __m512i _mm512_slli_epi32(__m512i v, int count) {
  return emulated::halves<__m512i, __m256i>([=](__m256i x) { return _mm256_slli_epi32(x, count); }, v);
}
inline __m512i _mm512_srli_epi32(__m512i v, int count) {
  return emulated::halves<__m512i, __m256i>([=](__m256i x) { return _mm256_srli_epi32(x, count); }, v);
}

// ---- What AVX2 lacks ------------------------------------------------------------------------------------------

inline __m512i _mm512_srlv_epi16(__m512i v, __m512i counts) {
  const auto x = emulated::split<uint16_t>(v), count = emulated::split<uint16_t>(counts);
  return emulated::each<__m512i, uint16_t>([&](int i) { return count[i] < 16 ? x[i] >> count[i] : 0; });
}

// Bit (a, b, c) of the truth table, for every bit of the three.
inline __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  const auto x = emulated::split<uint64_t>(a), y = emulated::split<uint64_t>(b), z = emulated::split<uint64_t>(c);
  return emulated::each<__m512i, uint64_t>([&](int i) {
    uint64_t result = 0;
    for (int row = 0; row < 8; ++row) {
      const uint64_t here = (row & 4 ? x[i] : ~x[i]) & (row & 2 ? y[i] : ~y[i]) & (row & 1 ? z[i] : ~z[i]);
      if (table >> row & 1) result |= here;
    }
    return result;
  });
}

// Byte i of a qword: the 8 bits of the same qword of `v` that start at bit `control`, going round.
inline __m512i _mm512_multishift_epi64_epi8(__m512i control, __m512i v) {
  const auto from = emulated::split<uint8_t>(control);
  const auto qwords = emulated::split<uint64_t>(v);
  return emulated::each<__m512i, uint8_t>([&](int i) { return std::rotr(qwords[i / 8], from[i] & 63); });
}

inline __m512i _mm512_permutexvar_epi8(__m512i index, __m512i v) {
  const auto at = emulated::split<uint8_t>(index), x = emulated::split<uint8_t>(v);
  return emulated::each<__m512i, uint8_t>([&](int i) { return x[at[i] & 63]; });
}
inline __m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) {
  const auto at = emulated::split<uint16_t>(index), x = emulated::split<uint16_t>(v);
  return emulated::each<__m512i, uint16_t>([&](int i) { return x[at[i] & 31]; });
}
inline __m512i _mm512_permutexvar_epi64(__m512i index, __m512i v) {
  const auto at = emulated::split<uint64_t>(index), x = emulated::split<uint64_t>(v);
  return emulated::each<__m512i, uint64_t>([&](int i) { return x[at[i] & 7]; });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 v) {
  const auto at = emulated::split<uint32_t>(index), x = emulated::split<uint32_t>(v);
  return emulated::each<__m512, uint32_t>([&](int i) { return x[at[i] & 15]; });
}
inline __m512i _mm512_permutex2var_epi8(__m512i first, __m512i index, __m512i second) {
  const auto at = emulated::split<uint8_t>(index), a = emulated::split<uint8_t>(first);
  const auto b = emulated::split<uint8_t>(second);
  return emulated::each<__m512i, uint8_t>([&](int i) { return (at[i] & 64 ? b : a)[at[i] & 63]; });
}

inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int control) {
  const auto x = emulated::split<float>(a), y = emulated::split<float>(b);
  return emulated::each<__m512, float>([&](int i) {
    return (i % 4 < 2 ? x : y)[i / 4 * 4 + (control >> 2 * (i % 4) & 3)];
  });
}
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int control) { return emulated::shuffled_lanes(a, b, control); }
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int control) {
  return emulated::shuffled_lanes(a, b, control);
}

inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  const auto x = emulated::split<uint32_t>(v);
  return emulated::each<__m256i, uint16_t>([&](int i) { return x[i]; });
}

// ---- Masks ----------------------------------------------------------------------------------------------------

inline __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  return emulated::mask_of<__mmask64, uint8_t>(_mm512_and_si512(a, b), [](uint8_t x) { return x != 0; });
}
inline __mmask32 _mm512_test_epi16_mask(__m512i a, __m512i b) {
  return emulated::mask_of<__mmask32, uint16_t>(_mm512_and_si512(a, b), [](uint16_t x) { return x != 0; });
}
inline __mmask64 _mm512_cmpeq_epi8_mask(__m512i a, __m512i b) {
  const auto other = emulated::split<uint8_t>(b);
  int i = 0;
  return emulated::mask_of<__mmask64, uint8_t>(a, [&](uint8_t x) { return x == other[i++]; });
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_UNORD_Q) {
    std::fputs("emulated AVX-512: only comparisons for NaN are there\n", stderr);
    std::abort();
  }
  const auto other = emulated::split<float>(b);
  int i = 0;
  return emulated::mask_of<__mmask16, float>(a, [&](float x) { return std::isnan(x) || std::isnan(other[i++]); });
}
inline __m512i _mm512_mask_mov_epi8(__m512i otherwise, __mmask64 mask, __m512i v) {
  return emulated::blended<__m512i, uint8_t>(otherwise, mask, v);
}
inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i v) {
  return emulated::blended<__m512i, uint32_t>(otherwise, mask, v);
}
inline __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 v) {
  return emulated::blended<__m512, uint32_t>(otherwise, mask, v);
}
inline __m512i _mm512_maskz_expand_epi8(__mmask64 mask, __m512i v) {
  return emulated::expanded<__m512i, uint8_t>(mask, v);
}
inline __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i v) {
  return emulated::expanded<__m512i, uint16_t>(mask, v);
}
inline __m512i _mm512_maskz_compress_epi8(__mmask64 mask, __m512i v) {
  return emulated::compressed<__m512i, uint8_t>(mask, v);
}
inline __m512i _mm512_maskz_compress_epi16(__mmask32 mask, __m512i v) {
  return emulated::compressed<__m512i, uint16_t>(mask, v);
}

// ---- Dot products ---------------------------------------------------------------------------------------------

inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) { return emulated::dot_bf16(sum, a, b); }
inline __m256 _mm256_dpbf16_ps(__m256 sum, __m256bh a, __m256bh b) { return emulated::dot_bf16(sum, a, b); }

// Unsigned times signed bytes; sums go round, they do not saturate.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const auto s = emulated::split<uint32_t>(sum);
  const auto x = emulated::split<uint8_t>(a);
  const auto y = emulated::split<int8_t>(b);
  return emulated::each<__m512i, uint32_t>([&](int i) {
    uint32_t total = s[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += static_cast<uint32_t>(x[j] * y[j]);
    return total;
  });
}
inline __m256i _mm256_dpwssd_epi32(__m256i sum, __m256i a, __m256i b) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
  const auto x = emulated::split<float>(v);
  return emulated::each<__m256bh, uint16_t>([&](int i) { return emulated::to_bf16(x[i]); });
}
inline __m128bh _mm256_cvtneps_pbh(__m256 v) {
  const auto x = emulated::split<float>(v);
  return emulated::each<__m128bh, uint16_t>([&](int i) { return emulated::to_bf16(x[i]); });
}

}  // namespace vllm_sparse

#include "emulated_tiles.h"
