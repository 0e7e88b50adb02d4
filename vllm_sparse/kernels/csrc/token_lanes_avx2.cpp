#include "token_lanes_256.h"

namespace vllm_sparse {
namespace {

struct MultiplyAdd {
  static constexpr int kMostSums = 8;  // a product has a register of its own before it is added
  static __m256i add(__m256i sum, __m256i weights, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(weights, x));
  }
};

}  // namespace

constinit const LaneTable kLanesAvx2Bf16 = {kFloatLanes<Bf16Float, WidenBf16>, kByteLanes<Bf16Float, MultiplyAdd>,
                                  kNibbleLanes<Bf16Float, MultiplyAdd>};
constinit const LaneTable kLanesAvx2Fp16 = {kFloatLanes<Fp16Float, WidenFp16>, kByteLanes<Fp16Float, MultiplyAdd>,
                                  kNibbleLanes<Fp16Float, MultiplyAdd>};

}  // namespace vllm_sparse
