#include "encode.h"

#include <array>
#include <bit>
#include <cstring>

#include "encode_avx512.h"

namespace vllm_sparse {
namespace {

// Lanes of `kWidth` bytes in a 64-bit word.
template <int kWidth>
struct Lanes;

template <>
struct Lanes<1> {
  static constexpr uint64_t kTop = 0x8080808080808080;
  // Brings bit 0 of every lane to the top bits, lane i to bit i.
  static unsigned gather(uint64_t flags) { return static_cast<unsigned>((flags * 0x0102040810204080) >> 56); }
};

template <>
struct Lanes<2> {
  static constexpr uint64_t kTop = 0x8000800080008000;
  static unsigned gather(uint64_t flags) {
    return static_cast<unsigned>((flags * ((1ull << 48) | (1ull << 33) | (1ull << 18) | (1ull << 3))) >> 48) & 15;
  }
};

uint64_t load(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

// One bit for each lane of a word that is not zero. Adding all ones below the top bit carries into it from any
// magnitude but 0, and never beyond it.
template <int kWidth, bool kFloating>
unsigned nonzero(uint64_t word) {
  constexpr uint64_t top = Lanes<kWidth>::kTop;
  uint64_t flags = (word & ~top) + ~top;
  if constexpr (!kFloating) flags |= word;
  return Lanes<kWidth>::gather((flags & top) >> (8 * kWidth - 1));
}

// The non-zero bits of 8 values.
template <int kWidth, bool kFloating>
unsigned nonzero_byte(const uint8_t* from) {
  if constexpr (kWidth == 1) {
    return nonzero<1, kFloating>(load(from));
  } else {
    return nonzero<2, kFloating>(load(from)) | nonzero<2, kFloating>(load(from + 8)) << 4;
  }
}

constexpr auto kCrowded = [] {
  std::array<uint8_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    table[byte] = (std::popcount(byte & 15) > 2) + (std::popcount(byte >> 4) > 2);
  }
  return table;
}();

template <int kWidth, bool kFloating>
Counts count(const uint8_t* values, int64_t bytes) {
  Counts found;
  for (int64_t i = 0; i < bytes; i += 8 * kWidth) {
    const unsigned bits = nonzero_byte<kWidth, kFloating>(values + i);
    found.nonzeros += std::popcount(bits);
    found.crowded += kCrowded[bits];
  }
  return found;
}

// A group's stored bits, and the shifts that bring its kept values to lanes 0 and 1.
struct Group {
  uint8_t stored = 0, first = 0, second = 0;
};

std::array<Group, 16> groups_of(const uint8_t* positions, int width) {
  std::array<Group, 16> table;
  for (int pattern = 0; pattern < 16; ++pattern) {
    const int one = positions[2 * pattern] & 3, two = positions[2 * pattern + 1] & 3;
    // The second is never at place 0, so its shift is one lane less.
    table[pattern] = {static_cast<uint8_t>(1 << one | 1 << two), static_cast<uint8_t>(8 * width * one),
                      static_cast<uint8_t>(8 * width * (two > 0 ? two - 1 : 0))};
  }
  return table;
}

template <int kWidth, bool kFloating>
int64_t encode(const uint8_t* values, int64_t bytes, const uint8_t* positions, uint8_t* kept, uint8_t* bitmask) {
  const std::array<Group, 16> table = groups_of(positions, kWidth);
  constexpr uint64_t lane = (1ull << 8 * kWidth) - 1;
  const auto pair = [](uint64_t word, Group group) {
    return (word >> group.first & lane) | (word >> group.second & lane << 8 * kWidth);
  };
  int64_t crowded = 0;
  for (int64_t i = 0; i < bytes; i += 8 * kWidth) {
    const unsigned bits = nonzero_byte<kWidth, kFloating>(values + i);
    crowded += kCrowded[bits];
    const Group low = table[bits & 15], high = table[bits >> 4];
    *bitmask++ = static_cast<uint8_t>(low.stored | high.stored << 4);
    const uint64_t first = load(values + i);
    const uint64_t second = kWidth == 1 ? first >> 32 : load(values + i + 4 * kWidth * (kWidth == 2));
    const uint64_t out = (pair(first, low) & ((1ull << 16 * kWidth) - 1)) | pair(second, high) << 16 * kWidth;
    std::memcpy(kept, &out, 4 * kWidth);
    kept += 4 * kWidth;
  }
  return crowded;
}

// Whether whole steps can go to encode_avx512.cpp.
bool has_vectors() {
#if defined(__x86_64__)
  static const bool found = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi2") &&
                            __builtin_cpu_supports("popcnt");
  return found;
#else
  return false;
#endif
}

#if defined(__x86_64__)
constexpr auto& kVectors = kEncodeAvx512;
#else
constexpr EncodeVectors kVectors{};
#endif

// Whole steps with vectors where the processor has them, the rest without.
template <int kWidth, bool kFloating>
Counts count_all(const uint8_t* values, int64_t bytes, bool vectors) {
  const int64_t whole = vectors && has_vectors() ? bytes / kEncodeStep * kEncodeStep : 0;
  const Counts found = whole > 0 ? kVectors.count[kWidth - 1][kFloating](values, whole) : Counts{};
  const Counts rest = count<kWidth, kFloating>(values + whole, bytes - whole);
  return {found.nonzeros + rest.nonzeros, found.crowded + rest.crowded};
}

template <int kWidth, bool kFloating>
int64_t encode_all(const uint8_t* values, int64_t bytes, bool vectors, const uint8_t* positions, uint8_t* kept,
                   uint8_t* bitmask) {
  const int64_t whole = vectors && has_vectors() ? bytes / kEncodeStep * kEncodeStep : 0;
  int64_t crowded = 0;
  if (whole > 0) {
    const std::array<Group, 16> groups = groups_of(positions, kWidth);
    std::array<uint8_t, 256> stored{};
    for (unsigned byte = 0; byte < 256; ++byte) {
      stored[byte] = static_cast<uint8_t>(groups[byte & 15].stored | groups[byte >> 4].stored << 4);
    }
    crowded = kVectors.encode[kWidth - 1][kFloating](values, whole, stored.data(), kept, bitmask);
  }
  return crowded + encode<kWidth, kFloating>(values + whole, bytes - whole, positions, kept + whole / 2,
                                             bitmask + whole / (8 * kWidth));
}

// Without branches, so that compilers turn it into vectors on any processor.
template <typename T>
bool any_has(const uint8_t* values, int64_t bytes, uint64_t bits) {
  const T wanted = static_cast<T>(bits);
  T found = 0;
  for (int64_t i = 0; i < bytes; i += static_cast<int64_t>(sizeof(T))) {
    T value;
    std::memcpy(&value, values + i, sizeof value);
    found |= static_cast<T>((value & wanted) == wanted);
  }
  return found != 0;
}

}  // namespace

bool any_has_bits(const uint8_t* values, int64_t bytes, int width, uint64_t bits) {
  if (width == 1) return any_has<uint8_t>(values, bytes, bits);
  if (width == 2) return any_has<uint16_t>(values, bytes, bits);
  return any_has<uint32_t>(values, bytes, bits);
}

Counts count_groups(const uint8_t* values, int64_t bytes, int width, bool floating, bool vectors) {
  const auto run = [&](auto body) { return body(values, bytes, vectors); };
  if (width == 1) return floating ? run(count_all<1, true>) : run(count_all<1, false>);
  return floating ? run(count_all<2, true>) : run(count_all<2, false>);
}

int64_t encode_groups(const uint8_t* values, int64_t bytes, int width, bool floating, bool vectors,
                      const uint8_t* positions, uint8_t* kept, uint8_t* bitmask) {
  const auto run = [&](auto body) { return body(values, bytes, vectors, positions, kept, bitmask); };
  if (width == 1) return floating ? run(encode_all<1, true>) : run(encode_all<1, false>);
  return floating ? run(encode_all<2, true>) : run(encode_all<2, false>);
}

}  // namespace vllm_sparse

extern "C" {

// 1 if a value has all of `bits`, 0 if none has, -1 when the arguments are not what encode.h asks for.
__attribute__((visibility("default"))) int vllm_sparse_any_bits(const uint8_t* values, int64_t bytes, int width,
                                                                uint64_t bits) {
  if ((width != 1 && width != 2 && width != 4) || bytes < 0 || bytes % width != 0) return -1;
  return vllm_sparse::any_has_bits(values, bytes, width, bits) ? 1 : 0;
}

// out: non-zeros, crowded groups. Returns 0, or 1 when the arguments are not what encode.h asks for.
__attribute__((visibility("default"))) int vllm_sparse_count_24(const uint8_t* values, int64_t bytes, int width,
                                                                int floating, int vectors, int64_t* out) {
  if ((width != 1 && width != 2) || bytes < 0 || bytes % (8 * width) != 0) return 1;
  const vllm_sparse::Counts found = vllm_sparse::count_groups(values, bytes, width, floating != 0, vectors != 0);
  out[0] = found.nonzeros;
  out[1] = found.crowded;
  return 0;
}

// Returns the crowded groups, or -1 when the arguments are not what encode.h asks for.
__attribute__((visibility("default"))) int64_t vllm_sparse_encode_24(const uint8_t* values, int64_t bytes,
                                                                     int width, int floating, int vectors,
                                                                     const uint8_t* positions, uint8_t* kept,
                                                                     uint8_t* bitmask) {
  if ((width != 1 && width != 2) || bytes < 0 || bytes % (8 * width) != 0) return -1;
  return vllm_sparse::encode_groups(values, bytes, width, floating != 0, vectors != 0, positions, kept, bitmask);
}
}
