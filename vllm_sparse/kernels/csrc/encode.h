// From dense weights to the bytes on disk (kept values + bitmask), for the converter. Plain C functions: they
// know nothing of torch, and a caller through ctypes runs them beside other Python threads.
#pragma once

#include <cstdint>

namespace vllm_sparse {

// What one pass over dense values finds.
struct Counts {
  int64_t nonzeros = 0;
  // Groups of 4 with more than 2 non-zeros.
  int64_t crowded = 0;
};

// values: `bytes` of 4-value groups, `width` (1 or 2) bytes a value, a multiple of 8 values. With `floating`
// the sign bit alone does not make a value non-zero; with `vectors` AVX-512 is used where there is any.
Counts count_groups(const uint8_t* values, int64_t bytes, int width, bool floating, bool vectors);

// The same input to kept values (half the bytes) and little-endian bitmask (one byte for 8 values).
// positions: for each of the 16 non-zero patterns of a group, the two places that are kept, ascending.
// Returns the crowded groups; what is written for those means nothing.
int64_t encode_groups(const uint8_t* values, int64_t bytes, int width, bool floating, bool vectors,
                      const uint8_t* positions, uint8_t* kept, uint8_t* bitmask);

// Whether one of the values, `width` (1, 2 or 4) bytes each, has all of `bits`: an exponent of ones is Inf or NaN.
bool any_has_bits(const uint8_t* values, int64_t bytes, int width, uint64_t bits);

}  // namespace vllm_sparse
