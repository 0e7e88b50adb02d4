// Whole steps of encode.cpp's passes by vectors.
#pragma once

#include "encode.h"

namespace vllm_sparse {

constexpr int64_t kEncodeStep = 64;

// By bytes of a value - 1, and whether values are floats. `bytes` is a multiple of kEncodeStep.
struct EncodeVectors {
  Counts (*count[2][2])(const uint8_t* values, int64_t bytes);
  // stored: for each of 256 pairs of groups' non-zero bits, the bits that are kept. Returns the crowded groups.
  int64_t (*encode[2][2])(const uint8_t* values, int64_t bytes, const uint8_t* stored, uint8_t* kept,
                          uint8_t* bitmask);
};

#if defined(__x86_64__)
// Needs AVX-512 BW and VBMI2, and popcnt.
extern const EncodeVectors kEncodeAvx512;
#endif

}  // namespace vllm_sparse
