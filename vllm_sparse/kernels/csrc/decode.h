// Decoding quantised values to 16 bits, for any level; `Lanes` supplies its vectors:
//   kWidth                          floats in a vector: 1, 8 or 16
//   Vector int8(p), fp8(p)          kWidth values, from octets that lie 16 bytes apart; fp8 divided by 256
//   Vector int4(unit, at)           values at, at + 1, ... of a unit
//   Vector rows(first, second, at)  the scales of value `at` and those after it: 4 of a row, then 4 of the other
//   Vector multiply(a, b)
//   void store(v, uint16_t* out)    rounded to the activations' dtype
#pragma once

#include "activations.h"
#include "kernel.h"

namespace vllm_sparse {
namespace {

template <class Lanes, Kind kKind>
inline typename Lanes::Vector decode_values(const uint8_t* values, int u, int at) {
  if constexpr (kKind == Kind::kInt8) return Lanes::int8(values + byte_offset({u, at}));
  if constexpr (kKind == Kind::kFp8) return Lanes::fp8(values + byte_offset({u, at}));
  if constexpr (kKind == Kind::kInt4) return Lanes::int4(values + u * unit_bytes(kKind), at);
}

// Scales of the rows of unit u's pair, for block b.
inline const float* unit_scale(const Decode& d, int64_t b, int u) {
  const int64_t column = (d.first + b) * kBlockColumns + u % 2 * kChunk;
  return d.scales + column / d.group * kPanelRows + u / 2 * 2;
}

template <class Lanes, Kind kKind, bool kScaled>
void decode_blocks(const Decode& d) {
  const uint8_t* block = d.packed;
  uint8_t* out = d.out;
  for (int64_t b = 0; b < d.blocks; ++b, block += block_bytes(kKind), out += kWideBlockBytes) {
    if (d.next != nullptr) prefetch_block<1>(d.next + b * block_bytes(kKind), block_bytes(kKind), 0);
    std::memcpy(out, block, kMetadataBytes);
    for (int u = 0; u < kUnits; ++u) {
      uint16_t* to = reinterpret_cast<uint16_t*>(out + kMetadataBytes + u * 2 * kChunk);
      const float* scale = nullptr;
      if constexpr (kScaled) scale = unit_scale(d, b, u);
      for (int at = 0; at < kChunk; at += Lanes::kWidth) {
        auto values = decode_values<Lanes, kKind>(block + kMetadataBytes, u, at);
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
