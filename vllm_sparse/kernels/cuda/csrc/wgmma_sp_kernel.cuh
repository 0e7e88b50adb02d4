// mma_sp_kernel.cuh's product for Hopper, where the asynchronous sparse product of a warpgroup reads activations
// from shared memory by itself and has twice the rate: for 16 tokens and more, where loading fragments binds.
//
// The same rows per warp, layout, scales and results; what differs is the way along K. The pipeline moves in
// half blocks, one tile of 128 columns, so that many rows share the activations and several steps still fit the
// shared memory. A tile's weights are unpacked into registers while the tensor cores work on the tile before.
// Activations lie as the tensor cores want them, [tokens x 64] in rows of 128 bytes whose 16-byte parts are
// permuted by the token; which of a tile's groups a step takes is chosen as in mma_sp_kernel.cuh, by where the
// copies put them.
#pragma once

#include "mma_sp_kernel.cuh"
#include "wgmma.cuh"

// Defined, every tile's products are waited for at once. Under NVIDIA's memcheck, which puts code of its own between
// a kernel's instructions, a product came out wrong that is right without it; this tells whether the overlap matters.
#ifdef SPARSE24_SERIAL_PRODUCTS
#define SPARSE24_PRODUCTS_UNDER_WAY 0
#else
#define SPARSE24_PRODUCTS_UNDER_WAY 1
#endif

namespace sparse24 {

constexpr int kHalfColumns = kBlockColumns / 2;
constexpr int kAtomBytes = 128;  // of one token: two steps of 32 columns
// Slots that are loaded ahead are two fewer than there are: one is in use, one perhaps still read.
constexpr int kSlotsInUse = 2;

template <Format F>
constexpr int kHalfBytes = kValueBytes<F> / 2 + kMetadataBytes;

template <Format F>
SPARSE24_BOTH int half_weight_bytes(int warps, int row_tiles) {
  return warps * row_tiles * kHalfBytes<F>;
}
template <Format F>
SPARSE24_BOTH int half_stage_bytes(int warps, int row_tiles, int token_tiles) {
  return half_weight_bytes<F>(warps, row_tiles) + 8 * token_tiles * 2 * kHalfColumns;
}

// Where the activations of group `group` (0..31) of a tile lie: step group % 4, place 8 bytes * L of its 64.
template <int TOKENS>
SPARSE24_DEVICE int swizzled_offset(int token, int group) {
  const int step = group % 4, place = group / 8 + 4 * (group / 4 % 2);
  const int in_row = 64 * (step % 2) + 8 * place;
  return (step / 2) * TOKENS * kAtomBytes + kAtomBytes * token + 16 * (in_row / 16 ^ (token & 7)) + in_row % 16;
}

template <class T, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct WarpOfGroup : Warp<T, F, TOKEN_TILES, ROW_TILES> {
  using Base = Warp<T, F, TOKEN_TILES, ROW_TILES>;
  using Base::g;
  using Base::lane;
  using Base::p;
  using Base::sums;
  using Base::t;
  using Base::thread;
  using Base::tokens;
  using Base::warp;
  static constexpr int kTokens = 8 * TOKEN_TILES;
  static constexpr int kActivations = half_weight_bytes<F>(WARPS, ROW_TILES);
  static constexpr int kSlotBytes = kActivations + kTokens * 2 * kHalfColumns;
  // This lane's share of the copies and of the operands: constant but for the slot.
  const uint16_t* const warp_x = static_cast<const uint16_t*>(p.x) + (this->first_token + warp) * p.stride_x;
  int activations[2];  // of this warp's tokens, by turns
  int values[2];       // of row g, by side
  int target;
  // Int4: which row of scales the next tile has, and for how many tiles it still holds.
  int scale_row = 0;
  int scale_tiles = 0;
  int last_scale_row = 0;
  int scale_rows[2 * ROW_TILES];  // rows g and g + 8 of each tile; beyond the matrix its last one

  SPARSE24_DEVICE explicit WarpOfGroup(const Problem& problem) : Base(problem) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      activations[i] = kActivations + swizzled_offset<kTokens>(warp + WARPS * i, lane);
      values[i] = warp * ROW_TILES * kHalfBytes<F> + this->values_at(0, g, i);
      machine::keep(activations[i]);
      machine::keep(values[i]);
    }
    target = warp * ROW_TILES * kHalfBytes<F> + value_offset<F>(lane);
    machine::keep(target);
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; ++i) {
      const int row = 16 * this->row_block(i / 2) + g + 8 * (i % 2);
      scale_rows[i] = row < p.n ? row : p.n - 1;
    }
  }

  // Begin the copies of tile `tile` of block `kb`. The metadata of both tiles come with the first.
  SPARSE24_DEVICE void fetch_half(int kb, int tile, int slot) const {
    const int base = slot * kSlotBytes;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int at = base + target + r * kHalfBytes<F>;
      this->template copy_values<kValueBytes<F> / 2>(at, r, kb, tile * (kValueBytes<F> / 2));
      if (tile == 0) {
        this->copy_metadata(base + (warp * ROW_TILES + r) * kHalfBytes<F> + kValueBytes<F> / 2, r, kb);
      }
    }
    const int column = kb * kBlockColumns + tile * kHalfColumns + 4 * lane;
    const bool inside = column < p.k;
    const uint16_t* x = warp_x + (inside ? column : 0);
#pragma unroll
    for (int i = 0; i < (kTokens + WARPS - 1) / WARPS; ++i) {
      // Two of the warp's tokens on, the permutation is the same again.
      if (warp + WARPS * i < tokens) {
        machine::copy_activations(base + activations[i % 2] + i / 2 * 2 * WARPS * kAtomBytes, x, inside);
      }
      x += WARPS * p.stride_x;
    }
  }

  // Scales of rows g and g + 8 for the next tile; scale groups are whole tiles.
  SPARSE24_DEVICE void load_tile_scales(float (&scales)[ROW_TILES][2]) {
    if (scale_tiles == 0) {
      scale_tiles = p.group / kHalfColumns;
      // Columns beyond the matrix hold zeros; any scale will do.
      if (scale_row < last_scale_row) ++scale_row;
    }
    --scale_tiles;
    const int64_t start = static_cast<int64_t>(scale_row) * p.n;
    if (p.scale_type == 0) {
      const float* stored = static_cast<const float*>(p.scale) + start;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) scales[i / 2][i % 2] = machine::load_global(stored + scale_rows[i]);
    } else {
      const uint16_t* stored = static_cast<const uint16_t*>(p.scale) + start;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) {
        scales[i / 2][i % 2] = number_of(p.scale_type, machine::load_global(stored + scale_rows[i]));
      }
    }
  }

  // The first tile's place among the scales.
  SPARSE24_DEVICE void start_scales(int first) {
    const int tiles = p.group / kHalfColumns;
    last_scale_row = (p.k - 1) / p.group;
    scale_row = 2 * first / tiles;
    scale_tiles = tiles - 2 * first % tiles;
  }

  // Weights of the tile in `slot` as the products' operands.
  SPARSE24_DEVICE void load_operands(int slot, uint32_t (&a)[ROW_TILES][4][4]) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int at = slot * kSlotBytes + values[part / 2] + r * kHalfBytes<F>;
        const FourGroups<F> words = this->load_words(at + part % 2 * (kValueBytes<F> / 4));
#pragma unroll
        for (int step = 0; step < 4; ++step) a[r][step][part] = pair_of<T, F>(words, step);
      }
    }
  }

  template <int TILE>
  SPARSE24_DEVICE void multiply_half(int slot, const uint32_t (&a)[ROW_TILES][4][4],
                                     const uint32_t (&metadata)[ROW_TILES][4],
                                     float (&acc)[ROW_TILES][TOKEN_TILES][4], int add) const {
    const int base = slot * kSlotBytes + kActivations;
    machine::begin_products();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint64_t b = machine::matrix_descriptor(base + (step / 2) * kTokens * kAtomBytes + 64 * (step % 2));
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        machine::wgmma_sp<T, TILE, TOKEN_TILES>(acc[r], a[r][step], b, metadata[r][step], step > 0 || add);
      }
    }
    machine::commit_products();
  }

  // Int4: the tile's sums apart, times its scales.
  template <int TILE>
  SPARSE24_DEVICE void multiply_scaled_half(int slot, const uint32_t (&a)[ROW_TILES][4][4],
                                            const uint32_t (&metadata)[ROW_TILES][4],
                                            const float (&scales)[ROW_TILES][2]) {
    float acc[ROW_TILES][TOKEN_TILES][4];
    multiply_half<TILE>(slot, a, metadata, acc, 0);
    machine::wait_products<0>();
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int tokens8 = 0; tokens8 < TOKEN_TILES; ++tokens8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][tokens8][i] += acc[r][tokens8][i] * scales[r][i / 2];
      }
    }
  }

  // One tile: wait for it, refill the slot that is free by now, multiply.
  template <int TILE>
  SPARSE24_DEVICE void half(int i, int count, int first, int& slot, uint32_t (&metadata)[ROW_TILES][4],
                            float (&next_scales)[ROW_TILES][2]) {
    const int ahead = p.stages - kSlotsInUse;
    machine::wait_copies(ahead - 1);
    machine::show_copies_to_tensor_cores();
    // The products of the tile before the last are done, so the slot that is refilled below is free.
    machine::wait_products<1>();
    // Everybody's copies of this tile are there, and everybody is done with the tile before the last.
    machine::sync_block();
    const int next = 2 * i + TILE + ahead;
    int free_slot = slot + ahead;
    if (free_slot >= p.stages) free_slot -= p.stages;
    if (next < 2 * count) fetch_half(first + (next >> 1), next & 1, free_slot);
    machine::commit_copies();
    float scales[ROW_TILES][2];
    if constexpr (F == Format::kInt4) {
#pragma unroll
      for (int j = 0; j < 2 * ROW_TILES; ++j) scales[j / 2][j % 2] = next_scales[j / 2][j % 2];
      if (2 * i + TILE + 1 < 2 * count) load_tile_scales(next_scales);
    }
    if constexpr (TILE == 0) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const int base = slot * kSlotBytes + (warp * ROW_TILES + r) * kHalfBytes<F>;
        this->load_metadata(base + kValueBytes<F> / 2, metadata[r]);
      }
    }
    uint32_t a[ROW_TILES][4][4];
    load_operands(slot, a);
    if constexpr (F == Format::kInt4) {
      multiply_scaled_half<TILE>(slot, a, metadata, scales);
    } else {
      multiply_half<TILE>(slot, a, metadata, sums, TILE > 0 || i > 0);
      if constexpr (SPARSE24_PRODUCTS_UNDER_WAY == 0) machine::wait_products<0>();
    }
    slot = slot + 1 == p.stages ? 0 : slot + 1;
  }

  SPARSE24_DEVICE void run_halves() {
    const int first = machine::block_z() * p.blocks_per_split;
    const int left = p.k_blocks - first;
    const int count = left < p.blocks_per_split ? left : p.blocks_per_split;
    if (count <= 0) {
      clear(sums);
      this->end();
      return;
    }
    if constexpr (F == Format::kInt4) clear(sums);
    for (int i = 0; i < p.stages - kSlotsInUse; ++i) {
      if (i < 2 * count) fetch_half(first + i / 2, i % 2, i);
      machine::commit_copies();
    }
    float next_scales[ROW_TILES][2] = {};
    if constexpr (F == Format::kInt4) {
      start_scales(first);
      load_tile_scales(next_scales);
    }
    uint32_t metadata[ROW_TILES][4];
    int slot = 0;
    for (int i = 0; i < count; ++i) {
      half<0>(i, count, first, slot, metadata, next_scales);
      half<1>(i, count, first, slot, metadata, next_scales);
    }
    machine::wait_products<0>();
    machine::wait_copies(0);
    this->end();
  }
};

template <class T, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
SPARSE24_KERNEL(256) wgmma_sp_24(const Problem p) {
#if defined(SPARSE24_EMULATE) || SPARSE24_HAS_WGMMA || !defined(__CUDA_ARCH__)
  WarpOfGroup<T, F, TOKEN_TILES, ROW_TILES, WARPS> warp(p);
  warp.run_halves();
#endif
}

}  // namespace sparse24
