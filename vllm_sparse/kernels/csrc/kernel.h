// What one instruction-set level provides: the innermost loops, and nothing that allocates or starts threads.
#pragma once

#include <cstdint>

#include "layout.h"

namespace vllm_sparse {

// Tokens are handled in tiles of at most kMaxTile. A tile's activations are stored as [chunk][tokens][64 bytes],
// a chunk being 32 columns of 16 bits or 64 columns of 8 bits, or as [chunk][tokens][32 floats].
constexpr int kMaxTile = 16;
// Raw 32-bit accumulators per token and panel: 4 row pairs x 16 lanes, stored as [pair][token][16]; for dense
// weights 8 rows x 16 lanes.
constexpr int kPairs = 4;
constexpr int kLanes = 16;
constexpr int64_t kAccumulators = int64_t{kPairs} * kLanes;
constexpr int64_t accumulators(Kind kind) { return is_dense(kind) ? kPanelRows * kLanes : kAccumulators; }
// The dense loops keep two rows of weights and one activation in registers beside the accumulators; those for int8
// the decoder's tables too.
constexpr int kMaxDenseTile = 14;
constexpr int kMaxDenseInt8Tile = 10;
// Two accumulators a token, and eight operands.
constexpr int kMaxInt4A8Tile = 8;

// Consecutive blocks of one panel, times a tile of tokens. `fresh` starts the accumulators from zero. `next` is
// the slab that will be wanted after this one: its lines are prefetched along the way, because with several
// tokens per weight the processor's own look-ahead no longer hides the memory.
struct Slab {
  const uint8_t* packed;
  const uint8_t* next;  // or null
  int64_t blocks;
  const uint8_t* x;
  int tokens;
  bool fresh;
  // Only for int4 weights with int8 activations:
  const float* scales;  // [group][8] of the panel, or null
  int64_t group;        // columns
  int64_t first;        // block of the panel that the slab starts with
};
// Accumulators are float, or int32 for int8 weights with int8 activations.
using SlabFn = void (*)(const Slab& slab, void* accumulators);

// Reduces raw accumulators to 8 rows per token, applies scales and bias, rounds and stores the first `rows` of
// them at y[token * ldy].
struct Epilogue {
  const float* scale;        // 8 values, or null
  const float* bias;         // 8 values, or null
  const float* correction;   // 8 values to subtract from the sums; only for int8 activations
  const float* token_scale;  // one per token; only for int8 activations
  uint16_t* y;
  float* wide;  // instead of y, if not null; only for dense weights
  int64_t ldy;
  int rows;
};
using StoreFn = void (*)(const void* accumulators, int tokens, const Epilogue& out);

// A tile of row-major activations.
struct Tile {
  const uint16_t* x;
  int64_t k;
  int tokens;
};
// Copies a tile to [chunk][tokens][64 bytes], zero beyond K. Returns whether any activation is NaN or infinite.
// `target` null only looks.
using GatherFn = bool (*)(const Tile& tile, uint8_t* target);
// A token's chunk of floats, in bytes.
constexpr int64_t kWideChunk = kChunk * sizeof(float);
// Quantises a tile symmetrically, one scale per token, to unsigned bytes of zero point 128, in the order that the loops
// want. A token that is not finite gets scale NaN.
using QuantizeFn = void (*)(const Tile& tile, uint8_t* target, float* scales);

// Decodes blocks of int8, fp8 or int4 values to 16-bit blocks. fp8 values come out divided by 256 (the caller's
// scale makes up for it). `scales` [group][8], if given, is multiplied in; the first block is block `first` of
// the panel.
struct Decode {
  Kind kind;
  const uint8_t* packed;
  const uint8_t* next;  // or null
  int64_t blocks;
  const float* scales;  // or null
  int64_t group;        // columns
  int64_t first;
  uint8_t* out;
};
using DecodeFn = void (*)(const Decode& decode);

// The product of a tile and the blocks of `decode`, decoded in registers; `out` is not used. `x`, `tokens` and the
// accumulators are as for a slab.
using DirectFn = void (*)(const Decode& decode, const uint8_t* x, int tokens, bool fresh, void* accumulators);
// For how many tokens, at most, that is better than decoding first. `scaled`: by groups.
using DirectTokensFn = int (*)(Kind kind, bool scaled);

struct LaneTable;

// Everything that depends on the dtype of activations and outputs.
struct KernelTable {
  SlabFn slab;
  StoreFn store;
  GatherFn gather;
  GatherFn gather_wide = nullptr;  // null: the 2:4 loops take what `gather` gives
  DecodeFn decode;
  SlabFn slab_a8;
  StoreFn store_a8;
  QuantizeFn quantize;  // octets have the order of the packed weight's
  SlabFn slab_a4;       // int4 weights, int8 activations
  StoreFn store_a4;
  QuantizeFn quantize_a4;     // in the order of slab_a4
  DirectFn direct = nullptr;  // null: decode, then slab
  DirectTokensFn direct_tokens = nullptr;
  SlabFn slab_dense = nullptr;  // null: no dense weights at this level
  SlabFn slab_dense_int8 = nullptr;
  StoreFn store_dense = nullptr;
  const LaneTable* lanes = nullptr;  // token_lanes.h
};

struct Level {
  KernelTable bf16;
  KernelTable fp16;
};

// Levels in order of preference; the numbers are part of the C interface. The AMX levels are kAvx512Bf16 with matrix
// units (tiles.h) for many tokens. Those from kAmxTiles on are for tests, never chosen by themselves: a level's way for
// many tokens (matrix units, or token lanes: token_lanes.h) for any number of them.
enum class Isa : int {
  kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4,
  kAmxTiles = 5, kAvx2Lanes = 6, kAvx512Bf16Lanes = 7
};
constexpr int kFirstForTests = static_cast<int>(Isa::kAmxTiles);

extern const Level kScalarLevel;
#if defined(__x86_64__)
extern const Level kAvx2Level;
extern const Level kAvx512Level;
extern const Level kAvx512Bf16Level;
#endif

// Exponent field of a 16-bit float, all ones for NaN and infinity.
template <bool Half>
constexpr uint16_t kExponentMask = Half ? 0x7C00 : 0x7F80;

}  // namespace vllm_sparse
