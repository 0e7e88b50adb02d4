// wgmma_sp_kernel.cuh's product for many tokens: up to 256 a block of threads, fed by the tensor memory accelerator.
//
// One warp begins the copies, the warpgroups beside its own multiply; barriers in shared memory count what has come
// and what is free, so that no two warpgroups wait for each other along K. Blocks of threads with neighbouring rows
// may be a cluster: each copies its share of the activations into the shared memory of all of them.
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
constexpr int kCopierThreads = 128;                      // a warpgroup, since registers move between warpgroups
constexpr int kCopierRegisters = 24;
constexpr int kMultiplierRegisters = 240;
constexpr int kPad = 8;                                  // numbers between the tokens of results in shared memory

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
  static constexpr int kPitch = 2 * (kRows + kPad);  // of a token's results

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

// What copying and multiplying warps agree on.
template <Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Pipeline {
  using At = Places<F, TOKEN_TILES, ROW_TILES, WARPS>;
  const Problem& p;
  const int lane = machine::thread_index() % 32;
  const int first_row_block = machine::block_y() * At::kRowBlocks;
  const int token_block = machine::block_z() / p.splits * machine::grid_x() + machine::block_x();
  const int first_token = token_block * At::kTokens;
  const int split = machine::block_z() % p.splits;
  const int first = split * p.blocks_per_split;
  const int left = p.k_blocks - first;
  const int count = left < 0 ? 0 : left < p.blocks_per_split ? left : p.blocks_per_split;

  SPARSE24_DEVICE explicit Pipeline(const Problem& problem) : p(problem) {}

  SPARSE24_DEVICE int barrier(int i) const { return At::barrier(p.stages, p.slots, i); }
  SPARSE24_DEVICE int full_stage(int i) const { return barrier(i); }
  SPARSE24_DEVICE int free_stage(int i) const { return barrier(p.stages + i); }
  SPARSE24_DEVICE int full_slot(int i) const { return barrier(2 * p.stages + i); }
  SPARSE24_DEVICE int free_slot(int i) const { return barrier(2 * p.stages + p.slots + i); }

  SPARSE24_DEVICE void init_barriers() const {
    for (int i = 0; i < p.stages; ++i) {
      machine::init_barrier(full_stage(i), 1);
      // Activations go to all blocks of the cluster at once, so all of them have to be done with the stage.
      machine::init_barrier(free_stage(i), WARPS * p.cluster);
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

  SPARSE24_DEVICE Copier(const Problem& problem, const TensorMaps& m) : Base(problem), maps(m) {}

  SPARSE24_DEVICE void copy_block(int kb, int i) const {
    const int full = this->full_slot(i), target = At::slot(p.stages, i);
    machine::announce_bytes(full, At::kSlotBytes);
    machine::copy_box(maps.values, target, full, 0, 2 * kb, this->first_row_block);
    machine::copy_box(maps.codes, target + At::kCodes, full, 0, kb, this->first_row_block);
  }

  // This block's share of the tokens, to all blocks of the cluster. Each counts the whole stage.
  SPARSE24_DEVICE void copy_stage(int stage, int i) const {
    const int full = this->full_stage(i), share = At::kTokens / p.cluster, column = stage * kStageColumns<E>;
    machine::announce_bytes(full, At::kStageBytes);
    if (p.cluster == 1) {
      machine::copy_box(maps.activations, i * At::kStageBytes, full, column, this->first_token);
      return;
    }
    const int rank = machine::cluster_rank();
    machine::copy_box_to_all(maps.activations, i * At::kStageBytes + rank * share * kAtomBytes, full, column,
                             this->first_token + rank * share, (1 << p.cluster) - 1);
  }

  SPARSE24_DEVICE void run() const {
    if (this->lane == 0) {
      machine::prefetch_map(maps.activations);
      machine::prefetch_map(maps.values);
      machine::prefetch_map(maps.codes);
    }
    Turn stage{0, 1}, slot{0, 1};
    for (int i = 0; i < this->count; ++i) {
      machine::wait_barrier(this->free_slot(slot.slot), slot.parity);
      if (this->lane == 0) copy_block(this->first + i, slot.slot);
      slot.advance(p.slots);
      for (int j = 0; j < kStagesOfBlock<E>; ++j) {
        machine::wait_barrier(this->free_stage(stage.slot), stage.parity);
        if (this->lane == 0) copy_stage(kStagesOfBlock<E> * (this->first + i) + j, stage.slot);
        stage.advance(p.stages);
      }
    }
    machine::sync_warp();
  }
};

template <class T, class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
struct Multiplier : Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS> {
  using Base = Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS>;
  using At = typename Base::At;
  using Base::lane;
  using Base::p;
  const int thread = machine::thread_index();
  const int warp = thread / 32;
  const int g = lane / 4;
  const int t = lane % 4;
  static constexpr bool kEightBits = E::bytes == 1;
  static constexpr int kWordBytesHere = kEightBits ? 4 : kWordBytes<F>;  // that a register of A is made of
  int words;  // of row g of the warp's first row block, the first groups that are this lane's
  int codes;
  typename E::Sum sums[ROW_TILES][TOKEN_TILES][4];

  // Row g + 8 is permuted as row g.
  SPARSE24_DEVICE explicit Multiplier(const Problem& problem) : Base(problem) {
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

  SPARSE24_DEVICE int row_block(int r) const { return this->first_row_block + warp * ROW_TILES + r; }

  // The nibbles of a tile of four bytes each, side by side in one word.
  SPARSE24_DEVICE uint32_t joined_nibbles(uint32_t low, uint32_t high, int tile) const {
    const uint32_t first = low >> (4 * tile) & 0x0F0F0F0Fu, second = high >> (4 * tile) & 0x0F0F0F0Fu;
    return machine::permute_bytes(first | first >> 4, second | second >> 4, 0x6420);
  }

  // Metadata of the block's products: of 16-bit numbers those of the four steps of this lane's tile (lane / 2 % 2),
  // rows g and g + 8, groups 4 * (t % 2) on; of 8-bit numbers those of the two steps of each tile, row g + 8 * (t % 2),
  // groups 8 * (t / 2) on. Beyond the matrix memory holds zeros, which are no codes; what stands for them is never
  // stored.
  SPARSE24_DEVICE void load_codes(int slot, uint32_t (&steps)[ROW_TILES][4]) const {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const bool inside = row_block(r) < p.row_blocks;
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

  // Int4's scales of rows g and g + 8 for both tiles of block `kb`; rows and columns beyond the matrix hold zeros, for
  // which any scale will do.
  SPARSE24_DEVICE void load_scales(int kb, float (&scales)[2][ROW_TILES][2]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int column = kb * kBlockColumns + tile * kHalfColumns;
      const int64_t start = static_cast<int64_t>((column < p.k ? column : p.k - 1) / p.group) * p.n;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; ++i) {
        const int row = 16 * row_block(i / 2) + g + 8 * (i % 2);
        scales[tile][i / 2][i % 2] = stored_scale(p, start + (row < p.n ? row : p.n - 1));
      }
    }
  }

  // This warp is done with what the barrier guards, in `blocks` blocks of the cluster.
  SPARSE24_DEVICE void release(int barrier, int blocks) const {
    machine::sync_warp();
    if (lane < blocks) machine::arrive_at(blocks == 1 ? machine::cluster_rank() : lane, barrier);
  }

  template <int STAGE>
  SPARSE24_DEVICE void multiply_stage(int slot, const uint32_t (&metadata)[ROW_TILES][4],
                                      const float (&scales)[2][ROW_TILES][2], Turn& stage, int& last_stage) {
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
    if (last_stage >= 0) release(this->free_stage(last_stage), p.cluster);
    last_stage = stage.slot;
    stage.advance(p.stages);
  }

  SPARSE24_DEVICE void multiply() {
    Turn stage{0, 0}, turn{0, 0};
    int last_stage = -1;
    float next_scales[2][ROW_TILES][2] = {};
    if constexpr (F == Format::kInt4) load_scales(this->first, next_scales);
    for (int i = 0; i < this->count; ++i) {
      float scales[2][ROW_TILES][2];
#pragma unroll
      for (int j = 0; j < 4 * ROW_TILES; ++j) scales[j % 2][j / 4][j / 2 % 2] = next_scales[j % 2][j / 4][j / 2 % 2];
      if constexpr (F == Format::kInt4) {
        if (i + 1 < this->count) load_scales(this->first + i + 1, next_scales);
      }
      machine::wait_barrier(this->full_slot(turn.slot), turn.parity);
      const int slot = At::slot(p.stages, turn.slot);
      uint32_t metadata[ROW_TILES][4];
      load_codes(slot, metadata);
      multiply_stage<0>(slot, metadata, scales, stage, last_stage);
      multiply_stage<1>(slot, metadata, scales, stage, last_stage);
      if constexpr (!kEightBits) {
        multiply_stage<2>(slot, metadata, scales, stage, last_stage);
        multiply_stage<3>(slot, metadata, scales, stage, last_stage);
      }
      // Its weights are in registers.
      release(this->free_slot(turn.slot), 1);
      turn.advance(p.slots);
    }
    machine::wait_products<0>();
  }

  SPARSE24_DEVICE void run() {
    if (this->count == 0) {
      clear(sums);
    } else {
      multiply();
    }
    if (p.partial) {
      store_partial();
    } else {
      store();
    }
  }

  // In the unit of 16-bit products, whose decoded fp8 numbers are 1/256 of what they stand for.
  SPARSE24_DEVICE float sum_of(typename E::Sum sum) const {
    const float unit = kEightBits && F == Format::kFp8 ? 1.0f / 256.0f : 1.0f;
    return static_cast<float>(sum) * unit;
  }

  SPARSE24_DEVICE void store_partial() const {
    float* const y = static_cast<float*>(p.y) + static_cast<int64_t>(this->split) * p.m * p.n;
    for_each_sum(sums, lane, [&](typename E::Sum sum, int row_here, int token_here) {
      const int row = 16 * row_block(0) + row_here, token = this->first_token + token_here;
      if (row < p.n && token < p.m) {
        machine::store_global(y + static_cast<int64_t>(token) * p.n + row, sum_of(sum));
      }
    });
  }

  // Through shared memory, where the pipeline was, so that a token's rows leave side by side.
  SPARSE24_DEVICE void store() const {
    machine::sync_threads_of(32 * WARPS);
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) stage_results(r);
    machine::sync_threads_of(32 * WARPS);
    copy_results();
  }

  SPARSE24_DEVICE void stage_results(int r) const {
    RowEnd ends[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int row = 16 * row_block(r) + g + 8 * side;
      ends[side] = row_end<T, F>(p, row < p.n ? row : p.n - 1);
    }
    // Matrices 2j and 2j + 1 are rows 0 to 7 and 8 to 15 of the tokens of tile j.
    const int row_here = 16 * (warp * ROW_TILES + r) + 8 * (lane / 8 % 2);
    const int target = At::kPitch * (8 * (lane / 16) + lane % 8) + 2 * row_here;
    static_assert(TOKEN_TILES % 2 == 0, "matrices are stored four at a time");
#pragma unroll
    for (int pair = 0; pair < TOKEN_TILES / 2; ++pair) {
      uint32_t matrices[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int tokens8 = 2 * pair + i / 2, side = i % 2;
        const int token = this->first_token + 8 * tokens8 + 2 * t;
        matrices[i] = rounded(sums[r][tokens8][2 * side], ends[side], token) |
                      static_cast<uint32_t>(rounded(sums[r][tokens8][2 * side + 1], ends[side], token + 1)) << 16;
      }
      machine::store_transposed(target + 16 * pair * At::kPitch, matrices);
    }
  }

  SPARSE24_DEVICE uint16_t rounded(typename E::Sum sum, const RowEnd& end, int token) const {
    return rounded_result<T>(sum_of(sum), end, token_factor(p, token < p.m ? token : p.m - 1));
  }

  SPARSE24_DEVICE void copy_results() const {
    constexpr int kParts = At::kRows / 8;
    const int first_row = 16 * this->first_row_block;
    for (int at = thread; at < At::kTokens * kParts; at += 32 * WARPS) {
      const int token = at / kParts, row = 8 * (at % kParts);
      if (this->first_token + token >= p.m || first_row + row >= p.n) continue;
      const int64_t start = static_cast<int64_t>(this->first_token + token) * p.n + first_row + row;
      uint16_t* const y = static_cast<uint16_t*>(p.y) + start;
      const int from = At::kPitch * token + 2 * row;
      // Of eight rows all or none are there, and whole lines start aligned.
      if (p.n % 8 == 0) {
        machine::store_global(reinterpret_cast<Words4*>(y), machine::load_shared<Words4>(from));
        continue;
      }
      for (int i = 0; i < 8 && first_row + row + i < p.n; ++i) {
        machine::store_global(y + i, machine::load_shared<uint16_t>(from + 2 * i));
      }
    }
  }
};

template <class T, class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
SPARSE24_KERNEL(32 * WARPS + kCopierThreads)
wgmma_sp_tma_24(const Problem p, const SPARSE24_GRID_CONSTANT TensorMaps maps) {
#if defined(SPARSE24_EMULATE) || SPARSE24_HAS_WGMMA || !defined(__CUDA_ARCH__)
  const Pipeline<F, TOKEN_TILES, ROW_TILES, WARPS> pipeline(p);
  // The last of the groups of token blocks may be short; the whole cluster goes.
  if (pipeline.first_token >= p.m) return;
  if (machine::thread_index() == 0) pipeline.init_barriers();
  machine::sync_cluster();
  if (machine::thread_index() >= 32 * WARPS) {
    machine::give_registers<kCopierRegisters>();
    if (machine::thread_index() < 32 * WARPS + 32) Copier<E, F, TOKEN_TILES, ROW_TILES, WARPS>(p, maps).run();
  } else {
    machine::take_registers<kMultiplierRegisters>();
    Multiplier<T, E, F, TOKEN_TILES, ROW_TILES, WARPS>(p).run();
  }
  // Nobody's memory goes before the others have arrived at its barriers for the last time.
  machine::sync_cluster();
#endif
}

}  // namespace sparse24
