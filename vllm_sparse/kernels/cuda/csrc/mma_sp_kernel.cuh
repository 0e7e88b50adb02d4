// y[m, n] = x[m, k] * W^T with W 2:4, for up to 64 tokens a pass: sparse tensor cores, weights read once.
//
// A warp owns 16 * ROW_TILES rows and walks along K in blocks of 256 columns, the blocks of triton/layout.py.
// Weights and metadata go to shared memory by asynchronous copies, several blocks ahead; the activations of
// a block of columns are copied once for all warps. The product is W x^T, so that the sparse operand is A.
//
// The packed layout is read as it is. mma.sp takes 8 groups of 4 columns at a time, called 0..7 here; which
// groups of the tile these are is free as long as both operands agree, and is chosen so that a lane's share of
// A lies side by side: group L of step i is group 8 * (L % 4) + 4 * (L / 4) + i of the tile's 32. The hardware
// wants metadata of tile 0 in the lanes 0 and 1 of each four and of tile 1 in the lanes 2 and 3, so every lane
// prepares the words of one tile: the nibbles of its four bytes are transposed by byte permutations.
#pragma once

#include "results.cuh"

namespace sparse24 {

constexpr int kTileGroups = 32;
constexpr int kBlockColumns = 256;
constexpr int kMetadataBytes = 512;
constexpr int kTokenBytes = 2 * kBlockColumns;

// Bytes of the values of one block of 16 rows x 256 columns.
template <Format F>
constexpr int kValueBytes = 2 * 16 * kTileGroups * kWordBytes<F>;

template <Format F>
SPARSE24_BOTH int weight_bytes(int warps, int row_tiles) {
  return warps * row_tiles * (kValueBytes<F> + kMetadataBytes);
}
template <Format F>
SPARSE24_BOTH int stage_bytes(int warps, int row_tiles, int token_tiles) {
  return weight_bytes<F>(warps, row_tiles) + 8 * token_tiles * kTokenBytes;
}

// Where 16 bytes of values lie in shared memory: rows of 128 bytes swap neighbours in every second row, so
// that the lanes of two rows do not meet in one bank. `chunk` counts 16 bytes from the block's start.
template <Format F>
SPARSE24_DEVICE int value_offset(int chunk) {
  if constexpr (F == Format::kSixteenBits) {
    return 16 * (chunk ^ (chunk >> 3 & 1));
  } else {
    return 16 * chunk;
  }
}
// The same for metadata, 32 bytes a row.
SPARSE24_DEVICE int metadata_offset(int row, int half) { return 32 * row + 16 * (half ^ (row >> 2 & 1)); }
// The same for the four activations of a group of a token, 512 bytes a token.
SPARSE24_DEVICE int activation_offset(int token, int group) {
  return kTokenBytes * token + 8 * (group ^ (token & 7));
}

template <class T, Format F, int TOKEN_TILES, int ROW_TILES>
struct Warp {
  static constexpr int kBytes = kValueBytes<F> + kMetadataBytes;
  const Problem& p;
  const int thread = machine::thread_index();
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int first_row_block = (machine::block_y() * (machine::block_threads() / 32) + warp) * ROW_TILES;
  const int first_token = machine::block_x() * 8 * TOKEN_TILES;
  const int tokens = p.m - first_token < 8 * TOKEN_TILES ? p.m - first_token : 8 * TOKEN_TILES;
  const int activations = weight_bytes<F>(machine::block_threads() / 32, ROW_TILES);
  const int slot_bytes = activations + 8 * TOKEN_TILES * kTokenBytes;
  const uint8_t* const lane_values = p.packed + 16 * lane;
  const uint8_t* const lane_codes = p.packed + p.metadata_offset + 16 * lane;
  int first_block[ROW_TILES];  // of the row of blocks of each of the warp's tiles
  float sums[ROW_TILES][TOKEN_TILES][4];

  SPARSE24_DEVICE explicit Warp(const Problem& problem) : p(problem) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) first_block[r] = row_block(r) * p.k_blocks;
  }

  // The row block of this warp's tile r; beyond the matrix the last one, whose results are not stored.
  SPARSE24_DEVICE int row_block(int r) const {
    const int wanted = first_row_block + r;
    return wanted < p.row_blocks ? wanted : p.row_blocks - 1;
  }

  // Begin this lane's copies of BYTES of values of tile r, from byte `from` of its block `kb` on; 512 bytes at a
  // time, so that everything but the block is the same for all of them.
  template <int BYTES>
  SPARSE24_DEVICE void copy_values(int target, int r, int kb, int from) const {
    const uint8_t* source = lane_values + static_cast<int64_t>(first_block[r] + kb) * kValueBytes<F> + from;
#pragma unroll
    for (int part = 0; part < BYTES / 512; ++part) {
      machine::copy_weights(target + 512 * part, source + 512 * part);
    }
  }
  SPARSE24_DEVICE void copy_metadata(int target, int r, int kb) const {
    machine::copy_weights(target + metadata_offset(lane / 2, lane % 2),
                          lane_codes + static_cast<int64_t>(first_block[r] + kb) * kMetadataBytes);
  }

  // Begin the copies of block `kb` into slot `slot`. Tokens that are not there are left as they are: each is a
  // column of B of its own, so whatever memory holds, NaN too, reaches only sums that are not stored.
  SPARSE24_DEVICE void fetch(int kb, int slot) const {
    const int base = slot * slot_bytes;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int target = base + (warp * ROW_TILES + r) * kBytes;
      copy_values<kValueBytes<F>>(target + value_offset<F>(lane), r, kb, 0);
      copy_metadata(target + kValueBytes<F>, r, kb);
    }
    const uint16_t* x = static_cast<const uint16_t*>(p.x);
    for (int at = thread; at < tokens * (kBlockColumns / 4); at += machine::block_threads()) {
      const int token = at / (kBlockColumns / 4), group = at % (kBlockColumns / 4);
      const int column = kb * kBlockColumns + 4 * group;
      const bool inside = column < p.k;
      const uint16_t* source = x + (first_token + token) * p.stride_x + (inside ? column : 0);
      machine::copy_activations(base + activations + activation_offset(token, group), source, inside);
    }
  }

  // Scales of rows g and g + 8 for both tiles of block `kb`.
  SPARSE24_DEVICE void load_group_scales(int kb, float (&scales)[ROW_TILES][2][2]) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int row = 16 * row_block(r) + g + 8 * side;
          const int column = kb * kBlockColumns + 128 * tile;
          const bool inside = row < p.n && column < p.k;
          const int64_t at = static_cast<int64_t>(column / p.group) * p.n + row;
          scales[r][tile][side] = inside ? stored_scale(p, at) : 0.0f;
        }
      }
    }
  }

  // The metadata operands of the four steps of this lane's tile (lane / 2 % 2), for the 16 rows at `base`.
  SPARSE24_DEVICE void load_metadata(int base, uint32_t (&steps)[4]) const {
    const int shift = 4 * (t / 2);
    uint32_t pairs[2][2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int row = g + 8 * side;
      uint32_t nibbles[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t word =
            machine::load_shared<uint32_t>(base + metadata_offset(row, j / 2) + 4 * (2 * (j % 2) + t % 2));
        nibbles[j] = word >> shift & 0x0F0F0F0Fu;
      }
      pairs[side][0] = nibbles[0] | nibbles[1] << 4;
      pairs[side][1] = nibbles[2] | nibbles[3] << 4;
    }
    // Byte i of each of the four words to word i.
    const uint32_t low01 = machine::permute_bytes(pairs[0][0], pairs[0][1], 0x5140);
    const uint32_t low23 = machine::permute_bytes(pairs[0][0], pairs[0][1], 0x7362);
    const uint32_t high01 = machine::permute_bytes(pairs[1][0], pairs[1][1], 0x5140);
    const uint32_t high23 = machine::permute_bytes(pairs[1][0], pairs[1][1], 0x7362);
    steps[0] = machine::permute_bytes(low01, high01, 0x5410);
    steps[1] = machine::permute_bytes(low01, high01, 0x7632);
    steps[2] = machine::permute_bytes(low23, high23, 0x5410);
    steps[3] = machine::permute_bytes(low23, high23, 0x7632);
  }

  // Values of four groups: those of the lane's group `side_by_side` (0: L = t, 1: L = t + 4) in `row`.
  SPARSE24_DEVICE int values_at(int tile, int row, int side_by_side) const {
    if constexpr (F == Format::kSixteenBits) {
      return value_offset<F>((16 * tile + row) * 8 + 2 * t + side_by_side);
    } else {
      return (16 * tile + row) * 32 * kWordBytes<F> + 4 * kWordBytes<F> * (2 * t + side_by_side);
    }
  }
  SPARSE24_DEVICE FourGroups<F> load_words(int offset) const {
    FourGroups<F> words;
    if constexpr (F == Format::kSixteenBits) {
      const Words4 loaded = machine::load_shared<Words4>(offset);
#pragma unroll
      for (int i = 0; i < 4; ++i) words.w[i] = loaded.w[i];
    } else if constexpr (F == Format::kInt4) {
      words.w[0] = machine::load_shared<uint32_t>(offset);
    } else {
      const Words2 loaded = machine::load_shared<Words2>(offset);
      words.w[0] = loaded.w[0];
      words.w[1] = loaded.w[1];
    }
    return words;
  }

  template <int TILE>
  SPARSE24_DEVICE void multiply_tile(int base, const uint32_t (&metadata)[ROW_TILES][4],
                                     float (&acc)[ROW_TILES][TOKEN_TILES][4]) const {
    FourGroups<F> values[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int start = base + (warp * ROW_TILES + r) * kBytes;
        values[r][part] = load_words(start + values_at(TILE, g + 8 * (part % 2), part / 2));
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int part = 0; part < 4; ++part) a[r][part] = pair_of<T, F>(values[r][part], step);
      }
#pragma unroll
      for (int tokens8 = 0; tokens8 < TOKEN_TILES; ++tokens8) {
        uint32_t b[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int group = kTileGroups * TILE + 8 * ((2 * part + t / 2) % 4) + 4 * (part / 2) + step;
          const int at = base + activations + activation_offset(8 * tokens8 + g, group) + 4 * (t % 2);
          b[part] = machine::load_shared<uint32_t>(at);
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          machine::mma_sp<T, TILE>(acc[r][tokens8], a[r], b, metadata[r][step]);
        }
      }
    }
  }

  template <int TILE>
  SPARSE24_DEVICE void multiply_scaled_tile(int base, const uint32_t (&metadata)[ROW_TILES][4],
                                            const float (&scales)[ROW_TILES][2][2]) {
    float acc[ROW_TILES][TOKEN_TILES][4] = {};
    multiply_tile<TILE>(base, metadata, acc);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
      for (int tokens8 = 0; tokens8 < TOKEN_TILES; ++tokens8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][tokens8][i] += acc[r][tokens8][i] * scales[r][TILE][i / 2];
      }
    }
  }

  SPARSE24_DEVICE void multiply(int slot, const float (&scales)[ROW_TILES][2][2]) {
    const int base = slot * slot_bytes;
    uint32_t metadata[ROW_TILES][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      load_metadata(base + (warp * ROW_TILES + r) * kBytes + kValueBytes<F>, metadata[r]);
    }
    if constexpr (F == Format::kInt4) {
      multiply_scaled_tile<0>(base, metadata, scales);
      multiply_scaled_tile<1>(base, metadata, scales);
    } else {
      multiply_tile<0>(base, metadata, sums);
      multiply_tile<1>(base, metadata, sums);
    }
  }

  SPARSE24_DEVICE void run() {
    const int first = machine::block_z() * p.blocks_per_split;
    const int left = p.k_blocks - first;
    const int count = left < p.blocks_per_split ? left : p.blocks_per_split;
    const int ahead = p.stages - 1;
    clear(sums);
    for (int i = 0; i < ahead; ++i) {
      if (i < count) fetch(first + i, i);
      machine::commit_copies();
    }
    float scales[ROW_TILES][2][2] = {};
    float next_scales[ROW_TILES][2][2] = {};
    if constexpr (F == Format::kInt4) {
      if (count > 0) load_group_scales(first, next_scales);
    }
    int slot = 0;
    for (int i = 0; i < count; ++i) {
      machine::wait_copies(ahead - 1);
      // Everybody's copies of this block are there, and everybody is done with the block before.
      machine::sync_block();
      if (i + ahead < count) fetch(first + i + ahead, slot == 0 ? ahead : slot - 1);
      machine::commit_copies();
      if constexpr (F == Format::kInt4) {
#pragma unroll
        for (int j = 0; j < 4 * ROW_TILES; ++j) scales[j / 4][j / 2 % 2][j % 2] = next_scales[j / 4][j / 2 % 2][j % 2];
        if (i + 1 < count) load_group_scales(first + i + 1, next_scales);
      }
      multiply(slot, scales);
      slot = slot == ahead ? 0 : slot + 1;
    }
    machine::wait_copies(0);
    end();
  }

  // Results to memory: this split's own, or those of all splits of the cluster.
  SPARSE24_DEVICE void end() const {
    if (p.cluster) {
      store_from_cluster();
    } else {
      store();
    }
  }

  SPARSE24_DEVICE void store_finished(float sum, int row, int token) const {
    const uint16_t bits = rounded_result<T>(sum, row_end<T, F>(p, row), token_factor(p, token));
    machine::store_global(static_cast<uint16_t*>(p.y) + static_cast<int64_t>(token) * p.n + row, bits);
  }

  // Each of this lane's sums with its row in the block of threads and its token in the pass.
  template <class Use>
  SPARSE24_DEVICE void each_sum(Use use) const {
    const int first = 16 * warp * ROW_TILES;
    for_each_sum(sums, lane, [&](float sum, int row, int token) { use(sum, first + row, token); });
  }

  // Every block of the cluster leaves its sums in its shared memory; then each adds up a share of the results,
  // always in the same order. Four numbers between the tokens keep a warp's stores out of each other's banks.
  SPARSE24_DEVICE void store_from_cluster() const {
    const int rows = machine::block_threads() / 2 * ROW_TILES;
    machine::sync_block();
    each_sum([&](float sum, int row, int token) { machine::store_shared(4 * (token * (rows + 4) + row), sum); });
    machine::sync_cluster();
    const int splits = machine::grid_z();
    for (int at = machine::cluster_rank() * machine::block_threads() + thread; at < tokens * rows;
         at += splits * machine::block_threads()) {
      const int token = at / rows, row = at % rows, whole_row = machine::block_y() * rows + row;
      if (whole_row >= p.n) continue;
      float sum = 0.0f;
      for (int rank = 0; rank < splits; ++rank) {
        sum += machine::load_shared_of(rank, 4 * (token * (rows + 4) + row));
      }
      store_finished(sum, whole_row, first_token + token);
    }
    // Nobody's memory goes before everybody has read it.
    machine::sync_cluster();
  }

  SPARSE24_DEVICE void store() const {
    const int first_row = 16 * (first_row_block - warp * ROW_TILES);
    each_sum([&](float sum, int row_here, int token_here) {
      const int row = first_row + row_here, token = first_token + token_here;
      if (row >= p.n || token >= p.m) return;
      if (p.partial) {
        const int64_t line = static_cast<int64_t>(machine::block_z()) * p.m + token;
        machine::store_global(static_cast<float*>(p.y) + line * p.n + row, sum);
      } else {
        store_finished(sum, row, token);
      }
    });
  }
};

template <class T, Format F, int TOKEN_TILES, int ROW_TILES>
SPARSE24_KERNEL(256) mma_sp_24(const Problem p) {
  Warp<T, F, TOKEN_TILES, ROW_TILES> warp(p);
  warp.run();
}

}  // namespace sparse24
