// What a launch needs to know; mirrored field by field in library.py.
#pragma once

#include <cstdint>

constexpr int kAbiVersion = 5;

struct Problem {
  const void* x;             // [m, k], 16-bit, rows 8-byte aligned; of wgmma_sp_tma also 8-bit, 16-byte aligned
  const uint8_t* packed;     // triton/layout.py's buffer
  const void* scale;         // [n] float32, or [groups, n] in scale_type; null: none
  const float* token_scale;  // [m]; null: none
  const void* bias;          // [n], 16-bit; null: none
  void* y;                   // [m, n], 16-bit; or float32 [splits, m, n] if partial
  int64_t stride_x;          // elements
  int64_t metadata_offset;   // bytes
  int32_t m, n, k;
  int32_t row_blocks, k_blocks, blocks_per_split;
  int32_t group;             // columns per scale, a multiple of 128; 0: one scale per row
  int32_t scale_type;        // 0 float32, 1 bfloat16, 2 float16
  int32_t partial;           // write unscaled sums of this split
  int32_t splits;            // parts of K
  // mma_sp, wgmma_sp: whether the splits are a cluster of blocks and add up there; 2 to 8, capability 9.0 and later.
  int32_t cluster;
  // In flight or in use: blocks, 2 to 4; of wgmma_sp half blocks, 3 to 6; of wgmma_sp_tma 128 bytes of each token.
  int32_t stages;
  int32_t slots;             // wgmma_sp_tma: blocks of weights in flight or in use, 2 or 3
  int32_t programs;          // wgmma_sp_tma: blocks of threads that take tile after tile; 0: as many as tiles
};

struct Launch {
  int32_t half;           // the 16-bit type: 0 bfloat16, 1 float16
  int32_t eight_bits;     // wgmma_sp_tma: activations are in 8 bits, of the weights' type
  int32_t format;         // values.cuh's Format
  int32_t token_tiles;    // eights of tokens per block of threads
  int32_t row_tiles;      // sixteens of rows per warp
  int32_t warps;          // that multiply
  int32_t kernel;         // 0 mma_sp, 1 wgmma_sp, 2 wgmma_sp_tma; the latter two for compute capability 9.0 only
};
