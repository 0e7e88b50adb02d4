// Decoding quantised values to 16 bits, one unit at a time; `Lanes` supplies the vectors of a level:
//   kWidth                          floats in a vector, a divisor of 16 that is at least 1
//   Vector int8(p), fp8(p)          kWidth values; fp8 divided by 256
//   Vector int4(p, high)            kWidth values from the low or high nibbles of kWidth bytes
//   Vector rows(first, second, at)  the scales of value `at` and those after it: 4 of a row, then 4 of the other
//   Vector multiply(a, b)
//   void store(v, uint16_t* out)    rounded to the activations' dtype
#pragma once

#include "activations.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

template <class Lanes, Kind kKind>
inline typename Lanes::Vector decode_values(const uint8_t* unit, int at) {
  if constexpr (kKind == Kind::kInt8) return Lanes::int8(unit + at);
  if constexpr (kKind == Kind::kFp8) return Lanes::fp8(unit + at);
  if constexpr (kKind == Kind::kInt4) return Lanes::int4(unit + at % 16, at >= 16);
}

template <class Lanes, Kind kKind, bool kScaled>
void decode_blocks(const Decode& d) {
  const uint8_t* block = d.packed;
  uint8_t* out = d.out;
  for (int64_t b = 0; b < d.blocks; ++b, block += block_bytes(kKind), out += kWideBlockBytes) {
    if (d.next != nullptr) prefetch_block<1>(d.next + b * block_bytes(kKind), block_bytes(kKind), 0);
    std::memcpy(out, block, kMetadataBytes);
    for (int u = 0; u < kUnits; ++u) {
      const uint8_t* unit = block + kMetadataBytes + u * unit_bytes(kKind);
      uint16_t* to = reinterpret_cast<uint16_t*>(out + kMetadataBytes + u * 2 * kChunk);
      const float* scale = nullptr;
      if constexpr (kScaled) {
        scale = d.scales + ((d.first + b) * kBlockColumns + u % 2 * kChunk) / d.group * kPanelRows + u / 2 * 2;
      }
      for (int at = 0; at < kChunk; at += Lanes::kWidth) {
        auto values = decode_values<Lanes, kKind>(unit, at);
        if constexpr (kScaled) values = Lanes::multiply(values, Lanes::rows(scale[0], scale[1], at));
        Lanes::store(values, to + at);
      }
    }
  }
}

template <class Lanes, bool kScaled>
void decode_kind(const Decode& d) {
  switch (d.kind) {
    case Kind::kInt8: return decode_blocks<Lanes, Kind::kInt8, kScaled>(d);
    case Kind::kFp8: return decode_blocks<Lanes, Kind::kFp8, kScaled>(d);
    default: return decode_blocks<Lanes, Kind::kInt4, kScaled>(d);
  }
}

template <class Lanes>
void decode(const Decode& d) {
  if (d.scales == nullptr) {
    decode_kind<Lanes, false>(d);
  } else {
    decode_kind<Lanes, true>(d);
  }
}

}  // namespace
}  // namespace vllm_sparse
