// Products of many tokens on matrix units: 2:4 weights are expanded once into cache and multiplied there as dense ones.
#pragma once

#include "kernel.h"
#include "linear.h"

namespace vllm_sparse {

// A step of a matrix unit multiplies 16 rows of 64 bytes of weights by 64 bytes of each of 16 tokens.
constexpr int64_t kTileRows = 16;
constexpr int64_t kTileTokens = 16;
constexpr int64_t kStepBytes = kTileRows * kLine;
constexpr int64_t kTileSums = kTileRows * kTileTokens;

// Two tiles of weights times one or two tiles of tokens.
struct TileProduct {
  const uint8_t* weights[2];  // [step][row][64 bytes]
  const uint8_t* tokens[2];   // [step][16 dwords along K][token]: two bf16 or four bytes each; the second may be null
  int64_t steps;
  void* sums[2][2];  // of weights i and tokens j: [row][token] float or int32
  bool fresh;        // start from zero
};

struct MatrixUnit {
  // Before and after a thread's products.
  void (*enter)();
  void (*leave)();
  void (*multiply)(const TileProduct& product);     // bf16
  void (*multiply_a8)(const TileProduct& product);  // signed weights, unsigned activations
};

#if defined(__x86_64__)
extern const MatrixUnit kAmxUnit;
// Whether this processor has AMX (bf16 and int8) and the system lets this process use it.
bool request_amx();

bool tiles_support(const LinearArgs& args);
// `kernel` is the avx512bf16 level's.
void linear_tiles(const LinearArgs& args, const KernelTable& kernel, const MatrixUnit& unit);
#endif

}  // namespace vllm_sparse
