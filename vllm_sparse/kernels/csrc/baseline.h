// What the 2:4 kernels are measured against: a dense product in the same 8-row panels, and pure reading.
#pragma once

#include <cstdint>

namespace vllm_sparse {

constexpr int kDenseMaxTokens = 4;

// A slice of panels [begin, end) of a dense bf16 weight stored as [panel][K/32][8][32], times `tokens`
// (1..kDenseMaxTokens) rows of x; y is row-major with `ldy` columns.
struct DensePanels {
  const uint16_t* weight;
  int64_t k;  // a multiple of 32
  int64_t begin, end;
  const uint16_t* x;
  int tokens;
  uint16_t* y;
  int64_t ldy;
};

#if defined(__x86_64__)
void dense_panels_avx512bf16(const DensePanels& args);
#endif

// Reads every byte and returns a checksum, so that the reads cannot be optimised away.
uint64_t read_all(const uint8_t* data, int64_t bytes);

}  // namespace vllm_sparse
