// What one instruction-set level provides: the innermost loops, and nothing that allocates or starts threads.
#pragma once

#include <cstdint>

#include "layout.h"

namespace vllm_sparse {

// Tokens are handled in tiles of at most kMaxTile; a tile's activations are stored as [K/32][tokens][32].
constexpr int kMaxTile = 16;
// Raw fp32 accumulators per token and panel: 4 row pairs x 16 lanes, stored as [pair][token][16].
constexpr int kPairs = 4;
constexpr int kLanes = 16;
constexpr int64_t kAccFloats = int64_t{kPairs} * kLanes;

// Accumulates `blocks` consecutive blocks of one panel times a tile of tokens. `fresh` starts from zero.
// `next` is the slab that will be wanted after this one: its lines are prefetched along the way, because with
// several tokens per weight the processor's own look-ahead no longer hides the memory.
struct Slab {
  const uint8_t* packed;
  const uint8_t* next;  // or null
  int64_t blocks;
  const uint16_t* x;
  int tokens;
  bool fresh;
};
using SlabFn = void (*)(const Slab& slab, float* acc);

// Reduces raw accumulators to 8 rows per token, applies scale (may be null) and bias, rounds and stores the
// first `rows` of them at y[token * ldy].
struct Epilogue {
  const float* scale;  // 8 values or null
  const float* bias;   // 8 values or null
  uint16_t* y;
  int64_t ldy;
  int rows;
};
using StoreFn = void (*)(const float* acc, int tokens, const Epilogue& out);

// Copies a tile of row-major activations into [padded K/32][tokens][32], zero beyond K. Returns whether any
// of them is NaN or infinite. `target` null only looks.
using GatherFn = bool (*)(const uint16_t* x, int64_t ldx, int64_t k, int tokens, uint16_t* target);

struct FloatKernel {
  SlabFn slab;
  StoreFn store;
  GatherFn gather;
};

struct KernelTable {
  FloatKernel bf16;
  FloatKernel fp16;
};

// Levels in order of preference; the numbers are part of the C interface.
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
#endif

// Exponent field of a 16-bit float, all ones for NaN and infinity.
template <bool Half>
constexpr uint16_t kExponentMask = Half ? 0x7C00 : 0x7F80;

}  // namespace vllm_sparse
