// Plain C++ for any processor: the same layout, one value at a time.
#include "convert.h"
#include "gather.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

template <bool Half>
void slab(const Slab& slab, float* acc) {
  const int tokens = slab.tokens;
  const uint8_t* packed = slab.packed;
  const uint16_t* x = slab.x;
  if (slab.fresh) std::memset(acc, 0, sizeof(float) * kAccFloats * tokens);
  const int64_t bytes = block_bytes(Half ? Kind::kFp16 : Kind::kBf16);
  for (int64_t b = 0; b < slab.blocks; ++b, packed += bytes, x += 2 * kChunk * tokens) {
    for (int u = 0; u < kUnits; ++u) {
      uint64_t codes;
      uint16_t values[kChunk];
      std::memcpy(&codes, packed + 8 * u, sizeof(codes));
      std::memcpy(values, packed + kMetadataBytes + 2 * kChunk * u, sizeof(values));
      const uint16_t* chunk = x + (u % 2) * kChunk * tokens;
      for (int w = 0; w < kChunk; ++w) {
        // Value w belongs to group (w mod 4) / 2 of lane w / 8, and to the pair's second row if w mod 8 >= 4.
        const int column = 8 * (w / 8) + 4 * ((w % 4) / 2) + static_cast<int>((codes >> (2 * w)) & 3);
        const float value = to_float<Half>(values[w]);
        float* sums = acc + (u / 2) * tokens * kLanes + (w % 8) / 4;
        for (int t = 0; t < tokens; ++t) {
          sums[t * kLanes] += value * to_float<Half>(chunk[t * kChunk + column]);
        }
      }
    }
  }
}

template <bool Half>
void store(const float* acc, int tokens, const Epilogue& out) {
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < out.rows; ++r) {
      float sum = acc[((r / 2) * tokens + t) * kLanes + r % 2];
      if (out.scale != nullptr) sum *= out.scale[r];
      if (out.bias != nullptr) sum += out.bias[r];
      out.y[t * out.ldy + r] = from_float<Half>(sum);
    }
  }
}

}  // namespace

const KernelTable kScalarKernels = {
    {slab<false>, store<false>, gather_tile<false>},
    {slab<true>, store<true>, gather_tile<true>},
};

}  // namespace vllm_sparse
