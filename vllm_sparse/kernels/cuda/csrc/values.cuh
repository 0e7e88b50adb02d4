// Kept values of a group, from the packed layout's word to two 16-bit numbers in one register. All exact.
#pragma once

#include "machine.cuh"

// Numbered as layout.FORMAT_NUMBER numbers them; 0 and 1 differ by the activations' type only.
enum class Format { kSixteenBits = 0, kInt8 = 2, kFp8 = 3, kInt4 = 4 };

// Bytes of one group's two values.
template <Format F>
constexpr int kWordBytes = F == Format::kSixteenBits ? 4 : F == Format::kInt4 ? 1 : 2;

// The words of 4 consecutive groups, in as many registers as they fill.
template <Format F>
struct FourGroups {
  uint32_t w[kWordBytes<F>];
};

// int8: byte + 128 as the low mantissa of a large number, then the large number is taken away.
template <class T>
SPARSE24_DEVICE uint32_t pair_of_int8(uint32_t words, int high) {
  const uint32_t unsigned_bytes = words ^ 0x80808080u;
  if constexpr (T::is_half) {
    const uint32_t both = machine::permute_bytes(unsigned_bytes, 0x64646464u, high ? 0x4342 : 0x4140);
    return machine::fma_halves<T>(both, 0x3C003C00u, 0xE480E480u);  // 1024 + 128 + v, times 1, minus 1152
  } else {
    // bfloat16 has too few bits for that; float32's upper half holds an 8-bit number whole.
    const uint32_t first = machine::permute_bytes(unsigned_bytes, 0x4B000000u, high ? 0x7442 : 0x7440);
    const uint32_t second = machine::permute_bytes(unsigned_bytes, 0x4B000000u, high ? 0x7443 : 0x7441);
    return machine::permute_bytes(machine::as_bits(machine::as_float(first) - 8388736.0f),
                                  machine::as_bits(machine::as_float(second) - 8388736.0f), 0x7632);
  }
}

// fp8 e4m3, divided by 256: exponent and mantissa move into the wider type's fields.
template <class T>
SPARSE24_DEVICE uint32_t pair_of_fp8(uint32_t words, int high) {
  const uint32_t both = machine::permute_bytes(words, 0, high ? 0x3424 : 0x1404);
  if constexpr (T::is_half) {
    return (both & 0x80008000u) | (both >> 1 & 0x3F803F80u);
  } else {
    // The exponent's bias is then 120 too small; 2^112 leaves the same 1/256 as above.
    const uint32_t small = (both & 0x80008000u) | (both >> 4 & 0x07F007F0u);
    return machine::fma_halves<T>(small, 0x77807780u, 0x80008000u);
  }
}

// int4: nibble + 8 as the low mantissa of 128 or 1024. The shift is shared by the four groups of a word.
template <class T>
SPARSE24_DEVICE uint32_t pair_of_int4(uint32_t bytes, int group) {
  const uint32_t both = machine::permute_bytes(bytes, bytes >> 4, 0x4400 | group * 0x1111);
  const uint32_t nibbles = both & 0x000F000Fu;
  if constexpr (T::is_half) {
    return machine::fma_halves<T>(nibbles ^ 0x64086408u, 0x3C003C00u, 0xE408E408u);
  } else {
    return machine::fma_halves<T>(nibbles ^ 0x43084308u, 0x3F803F80u, 0xC308C308u);
  }
}

// Group `i` (0..3) of `words`: left value in the low half.
template <class T, Format F>
SPARSE24_DEVICE uint32_t pair_of(const FourGroups<F>& words, int i) {
  if constexpr (F == Format::kSixteenBits) {
    return words.w[i];
  } else if constexpr (F == Format::kInt8) {
    return pair_of_int8<T>(words.w[i / 2], i % 2);
  } else if constexpr (F == Format::kFp8) {
    return pair_of_fp8<T>(words.w[i / 2], i % 2);
  } else {
    return pair_of_int4<T>(words.w[0], i);
  }
}
