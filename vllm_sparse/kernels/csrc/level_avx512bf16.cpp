// AVX-512 with BF16, VBMI and VNNI: Zen 4, Sapphire Rapids and later.
#include "avx512.h"

namespace vllm_sparse {
namespace {

// vpmultishiftqb brings the code of element i to the bottom of element i, a ternary logic masks it and adds the
// element's first column.
inline __m512i decode_codes(__m512i codes, __m512i control, __m512i mask, __m512i first) {
  return _mm512_ternarylogic_epi64(_mm512_multishift_epi64_epi8(control, codes), mask, first, 0xEA);
}

constexpr auto kWordShift = constant<uint16_t>([](int w) { return 2 * w; });

struct Selector {
  const __m512i control = load(kWordShift.of);
  const __m512i mask = _mm512_set1_epi16(3);
  const __m512i first = load(kFirstColumn.of);
  __m512i select(const uint8_t* metadata) const {
    int64_t codes;
    std::memcpy(&codes, metadata, sizeof(codes));
    return decode_codes(_mm512_set1_epi64(codes), control, mask, first);
  }
};

struct Bf16Ops : FloatAcc, Selector {
  static constexpr Kind kKind = Kind::kBf16;
  using Values = __m512i;
  static __m512i values(const uint8_t* p) { return load(p); }
  static __m512 dot(__m512 sum, __m512i v, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(v), reinterpret_cast<__m512bh>(x));
  }
};

// Byte b of a line is value 8 (b / 16) + b mod 8 of the unit of parity (b / 8) mod 2.
constexpr auto kByteShift = constant<uint8_t>([](int b) { return 2 * (8 * (b / 16) + b % 8); });
constexpr auto kFirstByte = constant<uint8_t>([](int b) { return 8 * (b / 8) + 4 * ((b % 4) / 2); });

struct Int8Ops : IntAcc {
  using Values = __m512i;
  const __m512i control = load(kByteShift.of);
  const __m512i mask = _mm512_set1_epi8(3);
  const __m512i first = load(kFirstByte.of);
  __m512i select(const uint8_t* metadata) const {
    return decode_codes(_mm512_broadcast_i64x2(load128(metadata)), control, mask, first);
  }
  static __m512i values(const uint8_t* p) { return load(p); }
  static __m512i permute(__m512i select, const uint8_t* x) { return _mm512_permutexvar_epi8(select, load(x)); }
  static __m512i dot(__m512i sum, __m512i v, __m512i x) { return _mm512_dpbusd_epi32(sum, x, v); }
};

struct Bf16Float {
  static constexpr bool kWide = false;
  static __m128i round(__m256 v) { return reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)); }
  static __m256i round(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
};

}  // namespace

const Level kAvx512Bf16Level = {
    {slab<Bf16Ops>, store<Bf16Float>, gather<false>, decode<Lanes<Bf16Float>>, slab<Int8Ops>, store_a8<Bf16Float>,
     quantize<false>},
    {slab<Fp16Ops<Selector>>, store<Fp16Float>, gather<true>, decode<Lanes<Fp16Float>>, slab<Int8Ops>,
     store_a8<Fp16Float>, quantize<true>},
};

}  // namespace vllm_sparse
