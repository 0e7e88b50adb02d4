// AVX-512 with BF16, VBMI and VNNI (Zen 4, Cooper Lake successors, Sapphire Rapids and later).
#include "avx512.h"

namespace vllm_sparse {
namespace {

// Turns a metadata qword into word indices: vpmultishiftqb brings code w to the bottom of word w, a ternary
// logic masks it and adds the word's first column.
constexpr Words kShift([](int w) { return 2 * w; });

struct Selector {
  const __m512i control = load(kShift.of);
  const __m512i mask = _mm512_set1_epi16(3);
  const __m512i first = load(kFirstColumn.of);
  __m512i select(const uint8_t* metadata) const {
    int64_t codes;
    std::memcpy(&codes, metadata, sizeof(codes));
    const __m512i moved = _mm512_multishift_epi64_epi8(control, _mm512_set1_epi64(codes));
    return _mm512_ternarylogic_epi64(moved, mask, first, 0xEA);
  }
};

struct Bf16Ops : Selector {
  static constexpr int64_t kBlockBytes = block_bytes(Kind::kBf16);
  static constexpr bool kWide = false;
  using Values = __m512i;
  Values values(const uint8_t* p) const { return load(p); }
  __m512 dot(__m512 sum, Values v, __m512i x) const {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(v), reinterpret_cast<__m512bh>(x));
  }
  static __m128i round(__m256 v) { return reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)); }
};

}  // namespace

const KernelTable kAvx512Bf16Kernels = {
    {slab<Bf16Ops>, store<Bf16Ops>, gather_tile<false>},
    {slab<Fp16Ops<Selector>>, store<Fp16Ops<Selector>>, gather_tile<true>},
};

}  // namespace vllm_sparse
