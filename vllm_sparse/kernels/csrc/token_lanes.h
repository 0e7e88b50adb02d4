// Products of many tokens with the tokens in the lanes of vectors: a kept weight, broadcast, multiplies the column of
// activations that its position selects, which is an address then and not a permutation.
#pragma once

#include "kernel.h"
#include "linear.h"

namespace vllm_sparse {

// A plane is eight tokens. Activations become columns of one dword for each token of a plane,
// [block][plane][column][8 tokens]; sums are [row of the panel][plane][8 tokens].
constexpr int64_t kPlaneTokens = 8;
constexpr int64_t kColumnBytes = kPlaneTokens * 4;
// Planes that one pass over a panel's weights serves, at most.
constexpr int64_t kMostPlanes = 6;
// A block's columns of a plane. Not a power of two, or the same column of two planes would be in the same bank of L1.
constexpr int64_t plane_bytes(int64_t columns) { return columns * kColumnBytes + kLine; }
// A row's weights in a block: values, dwords, and then where their columns lie in the plane, 16 bits each.
constexpr int64_t row_bytes(int64_t entries) { return entries * 6; }

// A block of a panel times consecutive planes.
struct LaneProduct {
  const uint8_t* entries;  // of 8 rows
  const uint8_t* columns;  // of the first plane
  int64_t planes;
  void* sums;
  const float* scales;  // of 8 rows, by which sums of integers are multiplied before they are added, or null
  bool fresh;           // start from zero
};

// The arithmetic for one sort of weights.
struct TokenLanes {
  int64_t columns;  // of a block
  int64_t entries;  // of a row in a block
  // Rows of activations as `gather` or `quantize` (kernel.h) leave them, for at most 8 tokens, to one plane's columns;
  // `target` is the plane's place in the first block and `stride` the bytes from one block to the next.
  void (*to_columns)(const uint8_t* rows, int tokens, int64_t blocks, uint8_t* target, int64_t stride);
  // A block of 16-bit, int8 or int4 weights to entries.
  void (*expand)(const uint8_t* block, uint8_t* entries);
  void (*multiply)(const LaneProduct& product);
  // A plane's sums, of which those of two rows lie `stride` dwords apart, to its first `tokens` outputs.
  void (*store)(const void* sums, int64_t stride, int tokens, const Epilogue& out);

  int64_t entry_bytes() const { return kPanelRows * row_bytes(entries); }
  int64_t plane_bytes() const { return vllm_sparse::plane_bytes(columns); }
};

struct LaneTable {
  TokenLanes wide;  // weights of 16 bits, and those that are decoded to them
  TokenLanes a8;    // int8 weights, int8 activations
  TokenLanes a4;    // int4 weights, int8 activations
};

#if defined(__x86_64__)
extern const LaneTable kLanesAvx2Bf16;
extern const LaneTable kLanesAvx2Fp16;
extern const LaneTable kLanesAvx512Bf16;
extern const LaneTable kLanesAvx512Bf16Fp16;
#endif

// Whether the level has token lanes for such weights.
bool lanes_support(const KernelTable& kernel, const LinearArgs& args);
void linear_lanes(const LinearArgs& args, const KernelTable& kernel);

}  // namespace vllm_sparse
