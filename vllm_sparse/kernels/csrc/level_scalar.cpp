// Plain C++ for any processor: the same layout, one value at a time.
#include "convert.h"
#include "decode.h"
#include "kernel.h"
#include "nibble_a8.h"

namespace vllm_sparse {
namespace {

// Column, within a chunk of 32, that value w of a unit multiplies.
inline int column_of(int w, uint64_t codes) {
  return 8 * (w / 8) + 4 * ((w % 4) / 2) + static_cast<int>((codes >> (2 * w)) & 3);
}

inline uint64_t unit_codes(const uint8_t* block, int unit) {
  uint64_t codes;
  std::memcpy(&codes, block + 8 * unit, sizeof(codes));
  return codes;
}

template <bool Half>
void slab(const Slab& slab, void* accumulators) {
  float* acc = static_cast<float*>(accumulators);
  const int tokens = slab.tokens;
  if (slab.fresh) std::memset(acc, 0, sizeof(float) * kAccumulators * tokens);
  const uint16_t* x = reinterpret_cast<const uint16_t*>(slab.x);
  const uint8_t* block = slab.packed;
  for (int64_t b = 0; b < slab.blocks; ++b, block += kWideBlockBytes, x += kBlockColumns * tokens) {
    for (int u = 0; u < kUnits; ++u) {
      const uint64_t codes = unit_codes(block, u);
      uint16_t values[kChunk];
      std::memcpy(values, block + kMetadataBytes + 64 * u, sizeof(values));
      const uint16_t* chunk = x + (u % 2) * kChunk * tokens;
      for (int w = 0; w < kChunk; ++w) {
        const int column = column_of(w, codes);
        const float value = to_float<Half>(values[w]);
        float* sums = acc + (u / 2) * tokens * kLanes + (w % 8) / 4;
        for (int t = 0; t < tokens; ++t) {
          sums[t * kLanes] += value * to_float<Half>(chunk[t * kChunk + column]);
        }
      }
    }
  }
}

void slab_a8(const Slab& slab, void* accumulators) {
  int32_t* acc = static_cast<int32_t*>(accumulators);
  const int tokens = slab.tokens;
  if (slab.fresh) std::memset(acc, 0, sizeof(int32_t) * kAccumulators * tokens);
  const uint8_t* x = slab.x;
  const uint8_t* block = slab.packed;
  for (int64_t b = 0; b < slab.blocks; ++b, block += block_bytes(Kind::kInt8A8), x += kLine * tokens) {
    for (int u = 0; u < kUnits; ++u) {
      const uint64_t codes = unit_codes(block, u);
      for (int w = 0; w < kChunk; ++w) {
        const uint8_t byte = block[kMetadataBytes + byte_offset({u, w})];
        const int at = 8 * (2 * (w / 8) + u % 2) + column_of(w, codes) % 8;
        int32_t* sums = acc + (u / 2) * tokens * kLanes + 2 * (u % 2) + (w % 8) / 4;
        for (int t = 0; t < tokens; ++t) {
          sums[t * kLanes] += static_cast<int8_t>(byte) * static_cast<int32_t>(x[t * kLine + at]);
        }
      }
    }
  }
}

template <bool Half, bool kInt8>
void store(const void* accumulators, int tokens, const Epilogue& out) {
  for (int t = 0; t < tokens; ++t) {
    for (int r = 0; r < out.rows; ++r) {
      const int64_t at = ((r / 2) * tokens + t) * kLanes + r % 2;
      float sum;
      if constexpr (kInt8) {
        const int32_t* halves = static_cast<const int32_t*>(accumulators) + at;
        const int32_t raw = halves[0] + halves[2];
        sum = static_cast<float>(raw - static_cast<int32_t>(out.correction[r])) * out.token_scale[t];
      } else {
        sum = static_cast<const float*>(accumulators)[at];
      }
      if (out.scale != nullptr) sum *= out.scale[r];
      if (out.bias != nullptr) sum += out.bias[r];
      out.y[t * out.ldy + r] = from_float<Half>(sum);
    }
  }
}

template <bool Half>
struct Lanes {
  using Vector = float;
  static constexpr int kWidth = 1;
  static float int8(const uint8_t* p) { return static_cast<float>(static_cast<int8_t>(*p)); }
  static float fp8(const uint8_t* p) {
    return fp16_to_float(static_cast<uint16_t>((*p & 0x80) << 8 | (*p & 0x7F) << 7));
  }
  static float int4(const uint8_t* unit, int at) {
    const int64_t offset = nibble_offset({0, at});
    const int nibble = unit[offset / 2] >> (4 * (offset % 2)) & 15;
    return static_cast<float>((nibble ^ 8) - 8);
  }
  static float rows(float first, float second, int at) { return at % 8 < 4 ? first : second; }
  static float multiply(float a, float b) { return a * b; }
  static void store(float v, uint16_t* out) { *out = from_float<Half>(v); }
};

template <bool Half>
constexpr KernelTable kTable = {
    .slab = slab<Half>, .store = store<Half, false>, .gather = gather<Half>, .decode = decode<Lanes<Half>>,
    .slab_a8 = slab_a8, .store_a8 = store<Half, true>, .quantize = quantize<Half>, .slab_a4 = slab_a4<slab_a8, 4>,
    .store_a4 = store_a4<Half, 4>, .quantize_a4 = quantize<Half>};

}  // namespace

const Level kScalarLevel = {kTable<false>, kTable<true>};

}  // namespace vllm_sparse
