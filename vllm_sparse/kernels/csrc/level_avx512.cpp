// AVX-512 F/BW/VL/DQ alone (Skylake to Ice Lake): no BF16 dot product, no VBMI, no VNNI.
#include "avx512.h"
#include "dense.h"
#include "nibble_a8.h"
#include "token_lanes.h"

namespace vllm_sparse {
namespace {

// Spread each lane's 16 code bits to all its words, shift word w by its own amount, add its first column.
constexpr auto kSpread = constant<uint16_t>([](int w) { return 2 * (w / 8) | (2 * (w / 8) + 1) << 8; });
constexpr auto kShift = constant<uint16_t>([](int w) { return 2 * (w % 8); });

struct Selector {
  const __m512i spread = load(kSpread.of);
  const __m512i shift = load(kShift.of);
  const __m512i mask = _mm512_set1_epi16(3);
  const __m512i first = load(kFirstColumn.of);
  __m512i select(const uint8_t* metadata) const {
    int64_t codes;
    std::memcpy(&codes, metadata, sizeof(codes));
    const __m512i words = _mm512_shuffle_epi8(_mm512_set1_epi64(codes), spread);
    return _mm512_ternarylogic_epi64(_mm512_srlv_epi16(words, shift), mask, first, 0xEA);
  }
};

struct Bf16Ops : FloatAcc, Selector {
  static constexpr Kind kKind = Kind::kBf16;
  struct Values {
    __m512 even, odd;
  };
  // A bf16 is the upper half of a float: even words move up, odd ones are already there.
  static __m512 even(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static __m512 odd(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  static Values values(const uint8_t* p) {
    const __m512i v = load(p);
    return {even(v), odd(v)};
  }
  static __m512 dot(__m512 sum, const Values& v, __m512i x) {
    return _mm512_fmadd_ps(v.odd, odd(x), _mm512_fmadd_ps(v.even, even(x), sum));
  }
};

// Bytes select inside 128-bit lanes, even and odd bytes of a word separately: the 8 codes of an octet lie in 16
// bits, spread to its 4 words; code 2i goes to the low byte of word i and code 2i + 1 to the high byte.
constexpr auto kOctetSpread = constant<uint16_t>([](int w) {
  const int octet = w / 4;
  const int at = 8 * (octet % 2) + 2 * (octet / 2);
  return at | (at + 1) << 8;
});
constexpr auto kLowShift = constant<uint16_t>([](int w) { return 4 * (w % 4); });
constexpr auto kHighShift = constant<uint16_t>([](int w) { return 4 * (w % 4) + 2; });
constexpr auto kFirstByte = constant<uint8_t>([](int b) { return 8 * (b / 8 % 2) + 4 * ((b % 4) / 2); });

struct Int8Ops : IntAcc {
  struct Values {
    __m512i even, odd;  // as 16-bit words
  };
  const __m512i spread = load(kOctetSpread.of);
  const __m512i low = load(kLowShift.of);
  const __m512i high = load(kHighShift.of);
  const __m512i first = load(kFirstByte.of);
  __m512i select(const uint8_t* metadata) const {
    const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i64x2(load128(metadata)), spread);
    const __m512i even = _mm512_and_si512(_mm512_srlv_epi16(words, low), _mm512_set1_epi16(3));
    const __m512i odd = _mm512_and_si512(_mm512_srlv_epi16(words, high), _mm512_set1_epi16(3));
    return _mm512_or_si512(_mm512_or_si512(even, _mm512_slli_epi16(odd, 8)), first);
  }
  static Values values(const uint8_t* p) {
    const __m512i v = load(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
  static __m512i permute(__m512i select, const uint8_t* x) { return _mm512_shuffle_epi8(load(x), select); }
  // vpmaddubsw would saturate (255 * 127 * 2), so widen to 16 bits.
  static __m512i dot(__m512i sum, const Values& v, __m512i x) {
    const __m512i even = _mm512_madd_epi16(v.even, _mm512_and_si512(x, _mm512_set1_epi16(0xFF)));
    const __m512i odd = _mm512_madd_epi16(v.odd, _mm512_srli_epi16(x, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
  }
};

struct Bf16Float {
  static constexpr bool kWide = false;
  static __m256i round(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7FFF)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
  }
  static __m128i round(__m256 v) { return _mm256_castsi256_si128(round(_mm512_castps256_ps512(v))); }
};

}  // namespace

const Level kAvx512Level = {
    {.slab = slab<Bf16Ops>, .store = store<Bf16Float>, .gather = gather<false>, .decode = decode<Lanes<Bf16Float>>,
     .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Bf16Float>, .quantize = quantize<false>,
     .slab_a4 = slab_a4<slab<Int8Ops>, kLanes>, .store_a4 = store_a4<false, kLanes>, .quantize_a4 = quantize<false>,
     .slab_dense = dense_slab_avx2, .slab_dense_int8 = dense_int8_slab_avx2, .store_dense = dense_store_avx2,
     .lanes = &kLanesAvx2Bf16},
    {.slab = slab<Fp16Ops<Selector>>, .store = store<Fp16Float>, .gather = gather<true>,
     .decode = decode<Lanes<Fp16Float>>, .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Fp16Float>,
     .quantize = quantize<true>, .slab_a4 = slab_a4<slab<Int8Ops>, kLanes>, .store_a4 = store_a4<true, kLanes>,
     .quantize_a4 = quantize<true>, .lanes = &kLanesAvx2Fp16},
};

}  // namespace vllm_sparse
