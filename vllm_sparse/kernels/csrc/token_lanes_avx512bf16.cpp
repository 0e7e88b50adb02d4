// Token lanes with the dot products of AVX-512 BF16 and VNNI: half as many instructions as with AVX2's.
#include "token_lanes_256.h"

namespace vllm_sparse {
namespace {

struct Vnni {
  static constexpr int kMostSums = 12;
  static __m256i add(__m256i sum, __m256i weights, __m256i x) { return _mm256_dpwssd_epi32(sum, weights, x); }
};

struct Bf16Dot {
  static constexpr int kMostSums = 24;  // twelve would wait for one another: a product takes six cycles on Zen 4
  static __m256 add(__m256 sum, __m256i weights, __m256i x) {
    return _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(weights), reinterpret_cast<__m256bh>(x));
  }
};

}  // namespace

constinit const LaneTable kLanesAvx512Bf16 = {kBf16Lanes<Bf16Dot>, kByteLanes<Bf16Float, Vnni>,
                                              kNibbleLanes<Bf16Float, Vnni>};
constinit const LaneTable kLanesAvx512Bf16Fp16 = {kFloatLanes<Fp16Float, WidenFp16>, kByteLanes<Fp16Float, Vnni>,
                                                  kNibbleLanes<Fp16Float, Vnni>};

}  // namespace vllm_sparse
