// wgmma_sp_kernel.cuh's product for many tokens: up to 256 a block of threads, fed by the tensor memory accelerator.
//
// One warp begins the copies, the warpgroups beside its own multiply; barriers in shared memory count what has come
// and what is free, so that no two warpgroups wait for each other along K. A block of threads has one tile of the
// results, or, where fewer are started, takes one after another: the copies of the next tile begin while the results of
// one are still being stored.
//
// Boxes cannot permute groups of four columns, so here a step takes 32 columns as they come: group L of step i is
// group 8 * i + L of the tile, and lane t's share of A, groups t and t + 4, is one word each. Metadata then need one
// byte permutation a step. With A in registers the tensor cores read B at the full rate of the shared memory, which
// is what bounds this kernel; weights and codes pass through it once each way.
//
// E is the type of the operands: T, that of the results, or 8 bits (E4m3, Int8), where activations come in 8 bits and a
// word of two groups is a register of A as it is. Their step has 64 columns, their stage 128.
//
// Int4's scales are applied to the weights, rounded to the activations' type, as where a matrix is expanded: there
// are no registers for sums of scale groups apart.
#pragma once

#include "results.cuh"
#include "tma.cuh"
#include "wgmma_sp_kernel.cuh"

namespace sparse24 {

template <class E>
constexpr int kStageColumns = kAtomBytes / E::bytes;
template <class E>
constexpr int kStagesOfBlock = kBlockColumns / kStageColumns<E>;
constexpr int kCopierThreads = 128;  // a warpgroup, since registers move between warpgroups
constexpr int kCopierRegisters = 24;
constexpr int kMultiplierRegisters = 240;

// Where things lie in shared memory, in bytes from its start: activations, weights, barriers.
template <Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Places {
  static constexpr int kTokens = 8 * TOKEN_TILES;
  static constexpr int kRowBlocks = ROW_TILES * WARPS;
  static constexpr int kRows = 16 * kRowBlocks;
  static constexpr int kStageBytes = kTokens * kAtomBytes;
  static constexpr int kRowBytes = kTileGroups * kWordBytes<F>;
  static constexpr int kTileBytes = 16 * kRowBytes;
  static constexpr int kCodes = kRowBlocks * 2 * kTileBytes;
  static constexpr int kSlotBytes = kCodes + kRowBlocks * kMetadataBytes;

  static SPARSE24_BOTH int slot(int stages, int i) { return stages * kStageBytes + i * kSlotBytes; }
  // Full and free, of each stage of activations and then of each slot of weights.
  static SPARSE24_BOTH int barrier(int stages, int slots, int i) { return slot(stages, slots) + 8 * i; }
  static SPARSE24_BOTH int bytes(int stages, int slots) { return barrier(stages, slots, 2 * (stages + slots)); }
};

// A place in a ring of slots, and the parity of the barrier's phase there.
struct Turn {
  int slot;
  int parity;

  SPARSE24_DEVICE void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The tokens whose activations the blocks of threads that run together share in the L2 cache.
constexpr int kTokensTogether = 4096;

// How the results are cut into tiles: tokens first, then rows, then parts of K, all of it for one group of tokens after
// another. Worked out on the host, so that no register has to keep it.
struct Tiles {
  int tokens, rows;  // how many along each
  int together;      // along the tokens, in one group
  int in_group, count;

  static Tiles of(const Problem& p, int rows_of_tile, int tokens_of_tile) {
    const int tokens = (p.m + tokens_of_tile - 1) / tokens_of_tile, rows = (p.n + rows_of_tile - 1) / rows_of_tile;
    const int most = kTokensTogether / tokens_of_tile, together = tokens < most ? tokens : most;
    return {tokens, rows, together, together * rows * p.splits, tokens * rows * p.splits};
  }
};

struct Tile {
  int first_row_block;
  int first_token;
  int split;
  int first;  // block of columns
  int count;  // of them
};

// What copying and multiplying warps agree on.
template <Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Pipeline {
  using At = Places<F, TOKEN_TILES, ROW_TILES, WARPS>;
  const Problem& p;
  const Tiles& tiles;
  const int lane = machine::thread_index() % 32;

  SPARSE24_DEVICE Pipeline(const Problem& problem, const Tiles& all) : p(problem), tiles(all) {}

  SPARSE24_DEVICE Tile tile(int index) const {
    const int first_of_group = index / tiles.in_group * tiles.together, at = index % tiles.in_group;
    // The last group may be narrower.
    const int left_tokens = tiles.tokens - first_of_group;
    const int width = left_tokens < tiles.together ? left_tokens : tiles.together;
    const int split = at / width / tiles.rows, first = split * p.blocks_per_split, left = p.k_blocks - first;
    return {at / width % tiles.rows * At::kRowBlocks, (first_of_group + at % width) * At::kTokens, split, first,
            left < 0 ? 0 : left < p.blocks_per_split ? left : p.blocks_per_split};
  }

  // This block's tiles, one after another.
  template <class Use>
  SPARSE24_DEVICE void for_each_tile(Use use) const {
    for (int index = machine::block_x(); index < tiles.count; index += machine::grid_x()) use(tile(index));
  }

  SPARSE24_DEVICE int barrier(int i) const { return At::barrier(p.stages, p.slots, i); }
  SPARSE24_DEVICE int full_stage(int i) const { return barrier(i); }
  SPARSE24_DEVICE int free_stage(int i) const { return barrier(p.stages + i); }
  SPARSE24_DEVICE int full_slot(int i) const { return barrier(2 * p.stages + i); }
  SPARSE24_DEVICE int free_slot(int i) const { return barrier(2 * p.stages + p.slots + i); }

  SPARSE24_DEVICE void init_barriers() const {
    for (int i = 0; i < p.stages; ++i) {
      machine::init_barrier(full_stage(i), 1);
      machine::init_barrier(free_stage(i), WARPS);
    }
    for (int i = 0; i < p.slots; ++i) {
      machine::init_barrier(full_slot(i), 1);
      machine::init_barrier(free_slot(i), WARPS);
    }
    machine::show_barriers();
  }
};

template <class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Copier : Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS> {
  using Base = Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS>;
  using At = typename Base::At;
  using Base::p;
  const TensorMaps& maps;

  SPARSE24_DEVICE Copier(const Problem& problem, const Tiles& all, const TensorMaps& m) : Base(problem, all), maps(m) {}

  SPARSE24_DEVICE void copy_block(const Tile& tile, int kb, int i) const {
    const int full = this->full_slot(i), target = At::slot(p.stages, i);
    machine::announce_bytes(full, At::kSlotBytes);
    machine::copy_box(maps.values, target, full, 0, 2 * kb, tile.first_row_block);
    machine::copy_box(maps.codes, target + At::kCodes, full, 0, kb, tile.first_row_block);
  }

  SPARSE24_DEVICE void copy_stage(const Tile& tile, int stage, int i) const {
    const int full = this->full_stage(i);
    machine::announce_bytes(full, At::kStageBytes);
    machine::copy_box(maps.activations, i * At::kStageBytes, full, stage * kStageColumns<E>, tile.first_token);
  }

  SPARSE24_DEVICE void run() const {
    if (this->lane == 0) {
      machine::prefetch_map(maps.activations);
      machine::prefetch_map(maps.values);
      machine::prefetch_map(maps.codes);
    }
    Turn stage{0, 1}, slot{0, 1};
    this->for_each_tile([&](const Tile& tile) {
      for (int kb = tile.first; kb < tile.first + tile.count; ++kb) {
        machine::wait_barrier(this->free_slot(slot.slot), slot.parity);
        if (this->lane == 0) copy_block(tile, kb, slot.slot);
        slot.advance(p.slots);
        for (int j = 0; j < kStagesOfBlock<E>; ++j) {
          machine::wait_barrier(this->free_stage(stage.slot), stage.parity);
          if (this->lane == 0) copy_stage(tile, kStagesOfBlock<E> * kb + j, stage.slot);
          stage.advance(p.stages);
        }
      }
    });
    machine::sync_warp();
  }
};

template <class T, class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Multiplier : Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS> {
  using Base = Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS>;
  using At = typename Base::At;
  using Base::lane;
  using Base::p;
  const int warp = machine::thread_index() / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  static constexpr bool kEightBits = E::bytes == 1;
  static constexpr int kWordBytesHere = kEightBits ? 4 : kWordBytes<F>;  // that a register of A is made of
  int words;  // of row g of the warp's first row block, the first groups that are this lane's
  int codes;
  // Of one tile: nothing of them is worth keeping for the next.
  using Sums = typename E::Sum[ROW_TILES][TOKEN_TILES][4];

  // Row g + 8 is permuted as row g.
  SPARSE24_DEVICE Multiplier(const Problem& problem, const Tiles& all) : Base(problem, all) {
    constexpr int kChunks = At::kRowBytes / 16;
    const int row = g * At::kRowBytes;
    words = 2 * warp * ROW_TILES * At::kTileBytes + row + kWordBytesHere * t;
    words ^= 16 * (row / 128 % kChunks);
    codes = At::kCodes + warp * ROW_TILES * kMetadataBytes + kTileGroups * g;
    codes += kEightBits ? 8 * kTileGroups * (t % 2) + 8 * (t / 2) : 4 * (t % 2);
    codes ^= 16 * (g / 4);
    machine::keep(words);
    machine::keep(codes);
  }

  SPARSE24_DEVICE int row_block(const Tile& tile, int r) const { return tile.first_row_block + warp * ROW_TILES + r; }

  // The nibbles of a tile of four bytes each, side by side in one word.
  SPARSE24_DEVICE uint32_t joined_nibbles(uint32_t low, uint32_t high, int tile) const {
    const uint32_t first = low >> (4 * tile) & 0x0F0F0F0Fu, second = high >> (4 * tile) & 0x0F0F0F0Fu;
    return machine::permute_bytes(first | first >> 4, second | second >> 4, 0x6420);
  }

  // Metadata of the block's products: of 16-bit numbers those of the four steps of this lane's tile (lane / 2 % 2),
  // rows g and g + 8, groups 4 * (t % 2) on; of 8-bit numbers those of the two steps of each tile, row g + 8 * (t % 2),
  // groups 8 * (t / 2) on. Beyond the matrix memory holds zeros, which are no codes; what stands for them is never
  // stored.
  SPARSE24_DEVICE void load_codes(const Tile& tile, int slot, uint32_t (&steps)[ROW_TILES][4]) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const bool inside = row_block(tile, r) < p.row_blocks;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t word;
        if constexpr (kEightBits) {
          const int at = ((slot + codes) ^ (16 * (step % 2))) + r * kMetadataBytes;
          const Words2 both = machine::load_shared<Words2>(at);
          word = joined_nibbles(both.w[0], both.w[1], step / 2);
        } else {
          const int at = ((slot + codes) ^ (8 * step)) + r * kMetadataBytes;
          word = joined_nibbles(machine::load_shared<uint32_t>(at),
                                machine::load_shared<uint32_t>(at + 8 * kTileGroups), t / 2);
        }
        steps[r][step] = inside ? word : 0x44444444u;
      }
    }
  }

  SPARSE24_DEVICE uint32_t load_word(int at) const {
    if constexpr (kWordBytesHere == 4) return machine::load_shared<uint32_t>(at);
    if constexpr (kWordBytesHere == 2) return machine::load_shared<uint16_t>(at);
    return machine::load_shared<uint8_t>(at);
  }

  SPARSE24_DEVICE uint32_t operand_of(uint32_t stored, float scale) const {
    if constexpr (kEightBits) {
      return stored;
    } else {
      FourGroups<F> word{};
      word.w[0] = stored;
      const uint32_t pair = pair_of<T, F>(word, 0);
      return F == Format::kInt4 ? scaled_pair(pair, scale) : pair;
    }
  }

  // The weights of stage STAGE of a block as the products' operands: [step][row tile][part].
  template <int STAGE>
  SPARSE24_DEVICE void load_operands(int slot, const float (&scales)[2][ROW_TILES][2],
                                     uint32_t (&a)[2][ROW_TILES][4]) const {
    constexpr int kTile = STAGE * kStageColumns<E> / kHalfColumns;
    constexpr int kFirstWord = kEightBits ? 0 : 16 * (STAGE % 2);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int word = kFirstWord + 8 * step + 4 * (part / 2);
          const int at = ((slot + words) ^ (kWordBytesHere * word)) + (2 * r + kTile) * At::kTileBytes +
                         8 * (part % 2) * At::kRowBytes;
          a[step][r][part] = operand_of(load_word(at), scales[kTile][r][part % 2]);
        }
      }
    }
  }

  SPARSE24_DEVICE uint32_t scaled_pair(uint32_t pair, float scale) const {
    const float low = machine::from_sixteen_bits<T>(static_cast<uint16_t>(pair));
    const float high = machine::from_sixteen_bits<T>(static_cast<uint16_t>(pair >> 16));
    return machine::round_to_sixteen_bits<T>(low * scale) |
           static_cast<uint32_t>(machine::round_to_sixteen_bits<T>(high * scale)) << 16;
  }

  // Int4's scales of rows g and g + 8 for both halves of block `kb`; rows and columns beyond the matrix hold zeros, for
  // which any scale will do.
  SPARSE24_DEVICE void load_scales(const Tile& tile, int kb, float (&scales)[2][ROW_TILES][2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = kb * kBlockColumns + half * kHalfColumns;
      const int64_t start = static_cast<int64_t>((column < p.k ? column : p.k - 1) / p.group) * p.n;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int row = 16 * row_block(tile, i / 2) + g + 8 * (i % 2);
        scales[half][i / 2][i % 2] = stored_scale(p, start + (row < p.n ? row : p.n - 1));
      }
    }
  }

  // This warp is done with what the barrier guards.
  SPARSE24_DEVICE void release(int barrier) const {
    machine::sync_warp();
    if (lane == 0) machine::arrive_at(barrier);
  }

  template <int STAGE>
  SPARSE24_DEVICE void multiply_stage(int slot, const uint32_t (&metadata)[ROW_TILES][4],
                                      const float (&scales)[2][ROW_TILES][2], Turn& stage, int& last_stage,
                                      Sums& sums) const {
    // Metadata of 16-bit numbers come from the lanes of their tile, of 8-bit numbers from all.
    constexpr int kSelector = kEightBits ? 0 : STAGE / 2;
    uint32_t a[2][ROW_TILES][4];
    load_operands<STAGE>(slot, scales, a);
    machine::wait_barrier(this->full_stage(stage.slot), stage.parity);
    machine::begin_products();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint64_t b = machine::matrix_descriptor(stage.slot * At::kStageBytes + 64 * step);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const int of_step = kEightBits ? 2 * STAGE + step : 2 * (STAGE % 2) + step;
        machine::wgmma_sp<E, kSelector, TOKEN_TILES>(sums[r], a[step][r], b, metadata[r][of_step],
                                                     step > 0 || last_stage >= 0);
      }
    }
    machine::commit_products();
    // The products of the stage before are done: its activations may go.
    machine::wait_products<SPARSE24_PRODUCTS_UNDER_WAY>();
    if (last_stage >= 0) release(this->free_stage(last_stage));
    last_stage = stage.slot;
    stage.advance(p.stages);
  }

  SPARSE24_DEVICE void multiply(const Tile& tile, Turn& stage, Turn& turn, Sums& sums) const {
    int last_stage = -1;
    float next_scales[2][ROW_TILES][2] = {};
    if constexpr (F == Format::kInt4) load_scales(tile, tile.first, next_scales);
    for (int i = 0; i < tile.count; ++i) {
      float scales[2][ROW_TILES][2];
#pragma unroll
      for (int j = 0; j < 4 * ROW_TILES; ++j) scales[j % 2][j / 4][j / 2 % 2] = next_scales[j % 2][j / 4][j / 2 % 2];
      if constexpr (F == Format::kInt4) {
        if (i + 1 < tile.count) load_scales(tile, tile.first + i + 1, next_scales);
      }
      machine::wait_barrier(this->full_slot(turn.slot), turn.parity);
      const int slot = At::slot(p.stages, turn.slot);
      uint32_t metadata[ROW_TILES][4];
      load_codes(tile, slot, metadata);
      multiply_stage<0>(slot, metadata, scales, stage, last_stage, sums);
      multiply_stage<1>(slot, metadata, scales, stage, last_stage, sums);
      if constexpr (!kEightBits) {
        multiply_stage<2>(slot, metadata, scales, stage, last_stage, sums);
        multiply_stage<3>(slot, metadata, scales, stage, last_stage, sums);
      }
      // Its weights are in registers.
      release(this->free_slot(turn.slot));
      turn.advance(p.slots);
    }
    machine::wait_products<0>();
    release(this->free_stage(last_stage));
  }

  SPARSE24_DEVICE void run() const {
    Turn stage{0, 0}, turn{0, 0};
    this->for_each_tile([&](const Tile& tile) {
      Sums sums;
      if (tile.count == 0) {
        clear(sums);
      } else {
        multiply(tile, stage, turn, sums);
      }
      if (p.partial) {
        store_partial(tile, sums);
      } else if (p.n % 4 == 0) {
        store<true>(tile, sums);
      } else {
        store<false>(tile, sums);
      }
    });
  }

  // In the unit of 16-bit products, whose decoded fp8 numbers are 1/256 of what they stand for.
  SPARSE24_DEVICE float sum_of(typename E::Sum sum) const {
    const float unit = kEightBits && F == Format::kFp8 ? 1.0f / 256.0f : 1.0f;
    return static_cast<float>(sum) * unit;
  }

  // Not known to be the same for every tile: what follows from it would be kept in registers that the products need.
  SPARSE24_DEVICE int lane_of_tile() const {
    int here = lane;
    machine::keep(here);
    return here;
  }

  SPARSE24_DEVICE void store_partial(const Tile& tile, const Sums& sums) const {
    float* const y = static_cast<float*>(p.y) + static_cast<int64_t>(tile.split) * p.m * p.n;
    for_each_sum(sums, lane_of_tile(), [&](typename E::Sum sum, int row_here, int token_here) {
      const int row = 16 * row_block(tile, 0) + row_here, token = tile.first_token + token_here;
      if (row < p.n && token < p.m) {
        machine::store_global(y + static_cast<int64_t>(token) * p.n + row, sum_of(sum));
      }
    });
  }

  // Results are transposed in registers: lane (g, t) has token g then. Lanes that are neighbours swap halves, so that
  // each stores four rows side by side and four lanes a token's sixteen rows: whole sectors of memory. FOURS: of four
  // rows all or none are there, and they start aligned.
  template <bool FOURS>
  SPARSE24_DEVICE void store(const Tile& tile, const Sums& sums) const {
    const int here = lane_of_tile(), token = tile.first_token + here / 4, part = here % 4;
    const bool odd = part % 2;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      RowEnd ends[2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = 16 * row_block(tile, r) + here / 4 + 8 * side;
        ends[side] = row_end<T, F>(p, row < p.n ? row : p.n - 1);
      }
      const int row = 16 * row_block(tile, r) + 4 * (part / 2) + 8 * odd;
      const int left = row < p.n ? p.m - token : 0;
      uint16_t* y = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(token) * p.n + row;
#pragma unroll
      for (int tokens8 = 0; tokens8 < TOKEN_TILES; ++tokens8) {
        const int of_sums = tile.first_token + 8 * tokens8 + 2 * part;
        const float factors[2] = {factor_of(of_sums), factor_of(of_sums + 1)};
        uint32_t sides[2];
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const uint32_t low = rounded_result<T>(sum_of(sums[r][tokens8][2 * side]), ends[side], factors[0]);
          const uint32_t high = rounded_result<T>(sum_of(sums[r][tokens8][2 * side + 1]), ends[side], factors[1]);
          sides[side] = machine::transpose(low | high << 16);
        }
        const uint32_t other = machine::swap_with_neighbour(odd ? sides[0] : sides[1]);
        const Words2 rows{{odd ? other : sides[0], odd ? sides[1] : other}};
        if (8 * tokens8 < left) store_rows<FOURS>(rows, y, p.n - row);
        y += static_cast<int64_t>(8) * p.n;
      }
    }
  }

  template <bool FOURS>
  SPARSE24_DEVICE void store_rows(const Words2& rows, uint16_t* y, int count) const {
    if constexpr (FOURS) {
      machine::store_global(reinterpret_cast<Words2*>(y), rows);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) machine::store_global(y + i, static_cast<uint16_t>(rows.w[i / 2] >> (16 * (i % 2))));
      }
    }
  }

  SPARSE24_DEVICE float factor_of(int token) const { return token_factor(p, token < p.m ? token : p.m - 1); }
};

template <class T, class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
SPARSE24_KERNEL(32 * WARPS + kCopierThreads)
wgmma_sp_tma_24(const Problem p, const Tiles tiles, const SPARSE24_GRID_CONSTANT TensorMaps maps) {
#if defined(SPARSE24_EMULATE) || SPARSE24_HAS_WGMMA || !defined(__CUDA_ARCH__)
  const Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS> pipeline(p, tiles);
  if (machine::thread_index() == 0) pipeline.init_barriers();
  machine::sync_block();
  if (machine::thread_index() >= 32 * WARPS) {
    machine::give_registers<kCopierRegisters>();
    if (machine::thread_index() < 32 * WARPS + 32) Copier<E, F, TOKEN_TILES, ROW_TILES, WARPS>(p, tiles, maps).run();
  } else {
    machine::take_registers<kMultiplierRegisters>();
    Multiplier<T, E, F, TOKEN_TILES, ROW_TILES, WARPS>(p, tiles).run();
  }
#endif
}

}  // namespace sparse24
