// AVX-512 F/BW/VL/DQ alone (Skylake to Ice Lake): no BF16 dot product, no VBMI.
#include "avx512.h"

namespace vllm_sparse {
namespace {

// Spread each lane's 16 code bits to all its words, shift word w by its own amount, add its first column.
constexpr Words kSpread([](int w) { return 2 * (w / 8) | (2 * (w / 8) + 1) << 8; });
constexpr Words kShift([](int w) { return 2 * (w % 8); });

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

struct Bf16Ops : Selector {
  static constexpr int64_t kBlockBytes = block_bytes(Kind::kBf16);
  static constexpr bool kWide = false;
  struct Values {
    __m512 even, odd;
  };
  // A bf16 is the upper half of a float: even words move up, odd ones are already there.
  static __m512 even(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
  static __m512 odd(__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
  }
  Values values(const uint8_t* p) const {
    const __m512i v = load(p);
    return {even(v), odd(v)};
  }
  __m512 dot(__m512 sum, const Values& v, __m512i x) const {
    return _mm512_fmadd_ps(v.odd, odd(x), _mm512_fmadd_ps(v.even, even(x), sum));
  }
  static __m128i round(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __mmask8 nan = _mm256_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm256_cvtepi32_epi16(_mm256_srli_epi32(_mm256_mask_mov_epi32(rounded, nan, quiet), 16));
  }
};

}  // namespace

const KernelTable kAvx512Kernels = {
    {slab<Bf16Ops>, store<Bf16Ops>, gather_tile<false>},
    {slab<Fp16Ops<Selector>>, store<Fp16Ops<Selector>>, gather_tile<true>},
};

}  // namespace vllm_sparse
