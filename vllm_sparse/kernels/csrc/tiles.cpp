// Blocking and threads for matrix units, and the ways between memory and their registers.
#include "tiles.h"

#include <algorithm>

#include "avx512.h"
#include "nibble_a8.h"
#include "parallel.h"

namespace vllm_sparse {
namespace {

// Tokens that share one expansion of the weights.
constexpr int64_t kRound = 512;
// A unit's slab of weights is 32 KB, of an L1 of 48; a round's tokens of a slab stay in L2, and so do the sums of the
// units that share them.
constexpr int64_t kSlabBlocks = 8;
constexpr int64_t kUnitPanels = 2 * kTileRows / kPanelRows;
constexpr int64_t kSharedUnits = 4;

// ---- Weights: packed blocks to rows of a tile -----------------------------------------------------------------

// A group's nibble i + 4j to the bits of its kept columns.
constexpr auto kKept = constant<uint8_t>([](int b) { return 1 << (b & 3) | 1 << (b >> 2 & 3); });

// Byte 8u + 2L + r of a block's metadata becomes the kept ones of columns 8L.. of unit u's chunk, in row r of its pair.
inline __m512i kept_columns(const uint8_t* metadata) {
  const __m512i line = load(metadata);
  const __m512i fifteen = _mm512_set1_epi8(15);
  const __m512i low = _mm512_permutexvar_epi8(_mm512_and_si512(line, fifteen), load(kKept.of));
  const __m512i high =
      _mm512_permutexvar_epi8(_mm512_and_si512(_mm512_srli_epi16(line, 4), fifteen), load(kKept.of));
  return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}

// bf16: a unit's two rows one after the other, and 32 bits for each.
constexpr auto kUnitRows = constant<uint16_t>([](int w) { return 8 * (w % 16 / 4) + 4 * (w / 16) + w % 4; });
constexpr auto kUnitBits = constant<uint8_t>([](int b) { return 8 * (b / 8) + 2 * (b % 4) + b % 8 / 4; });

void expand_wide(const uint8_t* block, int64_t blocks, uint8_t* rows) {
  const __m512i order = load(kUnitRows.of);
  alignas(64) uint32_t bits[2 * kUnits];
  for (int64_t b = 0; b < blocks; ++b, block += kWideBlockBytes, rows += 2 * kStepBytes) {
    _mm512_store_si512(bits, _mm512_permutexvar_epi8(load(kUnitBits.of), kept_columns(block)));
    for (int u = 0; u < kUnits; ++u) {
      const __m512i values = _mm512_permutexvar_epi16(order, load(block + kMetadataBytes + kLine * u));
      const __m512i second = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(values, 1));
      uint8_t* to = rows + u % 2 * kStepBytes + u / 2 * 2 * kLine;
      _mm512_store_si512(to, _mm512_maskz_expand_epi16(bits[2 * u], values));
      _mm512_store_si512(to + kLine, _mm512_maskz_expand_epi16(bits[2 * u + 1], second));
    }
  }
}

// int8: a line's two rows one after the other, and 64 bits for each, in the order of the line's octets, which is also
// that of quantised activations.
constexpr auto kLineRows = constant<uint8_t>([](int b) { return 8 * (b % 32 / 4) + 4 * (b / 32) + b % 4; });
constexpr auto kLineBits = constant<uint8_t>(
    [](int b) { return 16 * (b / 16) + 8 * (b % 2) + 2 * (b % 8 / 2) + b / 8 % 2; });

void expand_bytes(const uint8_t* block, int64_t blocks, uint8_t* rows) {
  const __m512i order = load(kLineRows.of);
  alignas(64) uint64_t bits[kUnits];
  for (int64_t b = 0; b < blocks; ++b, block += block_bytes(Kind::kInt8A8), rows += kStepBytes) {
    _mm512_store_si512(bits, _mm512_permutexvar_epi8(load(kLineBits.of), kept_columns(block)));
    for (int p = 0; p < kPairs; ++p) {
      const __m512i values = _mm512_permutexvar_epi8(order, load(block + kMetadataBytes + kLine * p));
      const __m512i second = _mm512_castsi256_si512(_mm512_extracti64x4_epi64(values, 1));
      uint8_t* to = rows + 2 * p * kLine;
      _mm512_store_si512(to, _mm512_maskz_expand_epi8(bits[2 * p], values));
      _mm512_store_si512(to + kLine, _mm512_maskz_expand_epi8(bits[2 * p + 1], second));
    }
  }
}

// ---- Transposing 16 x 16 dwords -------------------------------------------------------------------------------

inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  // Lane l of r[i + c] then holds column 4l + c of rows i .. i + 3.
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  constexpr int kEven = _MM_SHUFFLE(2, 0, 2, 0), kOdd = _MM_SHUFFLE(3, 1, 3, 1);
  for (int c = 0; c < 4; ++c) {
    const __m512i even = _mm512_shuffle_i32x4(r[c], r[4 + c], kEven);
    const __m512i odd = _mm512_shuffle_i32x4(r[c], r[4 + c], kOdd);
    const __m512i more_even = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], kEven);
    const __m512i more_odd = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], kOdd);
    t[c] = _mm512_shuffle_i32x4(even, more_even, kEven);
    t[4 + c] = _mm512_shuffle_i32x4(odd, more_odd, kEven);
    t[8 + c] = _mm512_shuffle_i32x4(even, more_even, kOdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd, more_odd, kOdd);
  }
  std::copy(t, t + 16, r);
}

// ---- Tokens: rows to columns of a tile ------------------------------------------------------------------------

// Some tokens of a call, and where their activations lie for the matrix unit.
struct Round {
  const LinearArgs& args;
  const KernelTable& kernel;
  const MatrixUnit& unit;
  int64_t tokens;
  const uint16_t* x;
  uint16_t* y;
  uint8_t* columns = nullptr;  // [tile][step][16 dwords along K][token]
  float token_scale[kRound] = {};  // with int8 activations

  bool bytes() const { return has_int8_activations(args.kind); }
  // Whether sums are scaled group by group, and so float.
  bool grouped() const { return bytes() && args.group_scale != nullptr; }
  int64_t tiles_of_tokens() const { return ceil_div(tokens, kTileTokens); }
  int64_t steps_of(int64_t blocks) const { return bytes() ? blocks : 2 * blocks; }
  int64_t steps() const { return steps_of(args.shape.blocks()); }
  int size(int64_t tile) const { return static_cast<int>(std::min(kTileTokens, tokens - tile * kTileTokens)); }
};

// [step][token][64 bytes], as the other kernels want them, to [step][dword][16 tokens].
void to_columns(const uint8_t* rows, int tokens, int64_t steps, uint8_t* columns) {
  __m512i r[kTileTokens];
  for (int64_t step = 0; step < steps; ++step, rows += tokens * kLine, columns += kStepBytes) {
    for (int t = 0; t < kTileTokens; ++t) r[t] = t < tokens ? load(rows + t * kLine) : _mm512_setzero_si512();
    transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(columns + i * kLine, r[i]);
  }
}

void gather(Round& round) {
  thread_local Scratch columns_scratch;
  const int64_t tile_bytes = round.steps() * kStepBytes;
  round.columns = columns_scratch.get<uint8_t>(round.tiles_of_tokens() * tile_bytes);
  for_ranges(round.tiles_of_tokens(), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    uint8_t* rows = scratch.get<uint8_t>(tile_bytes);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t at = tile * kTileTokens;
      const Tile source{round.x + at * round.args.shape.k, round.args.shape.k, round.size(tile)};
      if (round.bytes()) {
        round.kernel.quantize(source, rows, round.token_scale + at);
      } else {
        round.kernel.gather(source, rows);
      }
      to_columns(rows, source.tokens, round.steps(), round.columns + tile * tile_bytes);
    }
  });
}

// ---- Sums to outputs ------------------------------------------------------------------------------------------

// A tile's sums [row][token], the first of its rows being `row`, as bf16 at y[token][row].
void store(const Round& round, int64_t row, int64_t tile, const uint8_t* sums) {
  const LinearArgs& args = round.args;
  const int64_t rows = std::min(kTileRows, args.shape.n - row);
  if (rows <= 0) return;
  const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1u);
  const auto of_rows = [&](const float* values) { return _mm512_maskz_loadu_ps(mask, values + row); };
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = load(sums + i * kLine);
  transpose(r);
  const __m512 none = _mm512_setzero_ps();
  const __m512 scale = args.channel_scale != nullptr ? of_rows(args.channel_scale) : none;
  const __m512 bias = args.bias != nullptr ? of_rows(args.bias) : none;
  const __m512 correction = round.bytes() ? of_rows(args.correction) : none;
  const __m512i whole_correction = _mm512_cvtps_epi32(correction);
  for (int t = 0; t < round.size(tile); ++t) {
    const int64_t token = tile * kTileTokens + t;
    __m512 sum = _mm512_castsi512_ps(r[t]);
    if (round.grouped()) {
      sum = _mm512_mul_ps(_mm512_sub_ps(sum, correction), _mm512_set1_ps(round.token_scale[token]));
    } else if (round.bytes()) {
      const __m512i signed_sum = _mm512_sub_epi32(r[t], whole_correction);
      sum = _mm512_mul_ps(_mm512_cvtepi32_ps(signed_sum), _mm512_set1_ps(round.token_scale[token]));
    }
    if (args.channel_scale != nullptr) sum = _mm512_mul_ps(sum, scale);
    if (args.bias != nullptr) sum = _mm512_add_ps(sum, bias);
    const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum));
    _mm256_mask_storeu_epi16(round.y + token * args.shape.n + row, mask, rounded);
  }
}

// ---- Units of 32 rows -----------------------------------------------------------------------------------------

struct Buffers {
  uint8_t* weights;  // [2][step][16 rows][64 bytes], of a slab of a unit
  uint8_t* decoded;  // a panel's slab in 16-bit blocks
  uint8_t* sums;     // [unit][tile of tokens][2][16 rows][16 tokens]
};

Buffers thread_buffers(const Round& round) {
  thread_local Scratch weights, decoded, sums;
  return {weights.get<uint8_t>(2 * round.steps_of(kSlabBlocks) * kStepBytes),
          decoded.get<uint8_t>(kSlabBlocks * kWideBlockBytes),
          sums.get<uint8_t>(kSharedUnits * round.tiles_of_tokens() * 2 * kTileSums * 4)};
}

// Expands `blocks` blocks of a panel, from block b on, to 8 rows of a tile.
void expand_panel(const Round& round, int64_t panel, int64_t b, int64_t blocks, uint8_t* decoded, uint8_t* rows) {
  const LinearArgs& args = round.args;
  if (panel >= args.shape.panels()) {
    for (int64_t step = 0; step < round.steps_of(blocks); ++step) {
      std::fill_n(rows + step * kStepBytes, kPanelRows * kLine, uint8_t{0});
    }
    return;
  }
  const uint8_t* packed = args.packed + (panel * args.shape.blocks() + b) * block_bytes(args.kind);
  if (args.kind == Kind::kInt4A8) {
    for (int64_t i = 0; i < blocks; ++i) {
      unpack_block(packed + i * block_bytes(Kind::kInt4A8), decoded + i * block_bytes(Kind::kInt8A8));
    }
    packed = decoded;
  }
  if (round.bytes()) return expand_bytes(packed, blocks, rows);
  if (is_decoded(args.kind)) {
    round.kernel.decode({args.kind, packed, nullptr, blocks, panel_scales(args, panel), args.group, b, decoded});
    packed = decoded;
  }
  expand_wide(packed, blocks, rows);
}

// Some blocks of a unit's slab, which starts at block `b`, expanded in `weights`.
struct Run {
  int64_t unit, b;
  const uint8_t* weights;
  int64_t first, blocks;  // of the slab
};

// Adds 16 x 16 sums of a scale group to the float sums of a tile that starts at `row`.
void add_scaled(const Round& round, int64_t row, int64_t group, const int32_t* part, bool fresh, float* sums) {
  for (int64_t i = 0; i < kTileRows; ++i) {
    const int64_t panel = (row + i) / kPanelRows;
    if (panel >= round.args.shape.panels()) return;
    const float scale = panel_scales(round.args, panel)[group * kPanelRows + i % kPanelRows];
    const __m512 before = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * kTileTokens);
    const __m512 sum = _mm512_cvtepi32_ps(load(part + i * kTileTokens));
    _mm512_storeu_ps(sums + i * kTileTokens, _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), before));
  }
}

// The product of a run and all tokens, added to the unit's sums [tile][2][16 rows][16 tokens].
void multiply_run(const Round& round, const Run& run, uint8_t* sums) {
  alignas(64) int32_t parts[4][kTileSums];
  const int64_t tile_bytes = round.steps() * kStepBytes;
  const int64_t all = round.tiles_of_tokens();
  const bool fresh = run.b + run.first == 0;
  const int64_t group = round.grouped() ? (run.b + run.first) * kBlockColumns / round.args.group : 0;
  TileProduct product{};
  for (int64_t i = 0; i < 2; ++i) {
    product.weights[i] = run.weights + (i * round.steps_of(kSlabBlocks) + round.steps_of(run.first)) * kStepBytes;
  }
  product.steps = round.steps_of(run.blocks);
  product.fresh = fresh || round.grouped();
  for (int64_t tile = 0; tile < all; tile += 2) {
    for (int64_t j = 0; j < 2; ++j) {
      const bool there = tile + j < all;
      const int64_t at = (tile + j) * tile_bytes + round.steps_of(run.b + run.first) * kStepBytes;
      product.tokens[j] = there ? round.columns + at : nullptr;
      for (int64_t i = 0; i < 2; ++i) {
        void* own = sums + ((tile + j) * 2 + i) * kTileSums * 4;
        product.sums[i][j] = round.grouped() ? parts[2 * j + i] : own;
      }
    }
    (round.bytes() ? round.unit.multiply_a8 : round.unit.multiply)(product);
    for (int64_t at = 0; round.grouped() && at < (tile + 1 < all ? 4 : 2); ++at) {
      float* own = reinterpret_cast<float*>(sums) + (tile * 2 + at) * kTileSums;
      add_scaled(round, (run.unit * 2 + at % 2) * kTileRows, group, parts[at], fresh, own);
    }
  }
}

void run_slab(const Round& round, int64_t unit, int64_t b, const Buffers& buffers, uint8_t* sums) {
  const int64_t blocks = std::min(kSlabBlocks, round.args.shape.blocks() - b);
  const int64_t half = round.steps_of(kSlabBlocks) * kStepBytes;
  for (int64_t i = 0; i < kUnitPanels; ++i) {
    uint8_t* tile = buffers.weights + i / 2 * half;
    expand_panel(round, unit * kUnitPanels + i, b, blocks, buffers.decoded, tile + i % 2 * kPanelRows * kLine);
  }
  Run run{unit, b, buffers.weights, 0, blocks};
  const int64_t group_blocks = round.grouped() ? round.args.group / kBlockColumns : 0;
  for (; run.first < blocks; run.first += run.blocks) {
    if (round.grouped()) {
      run.blocks = std::min(blocks - run.first, group_blocks - (b + run.first) % group_blocks);
    }
    multiply_run(round, run, sums);
  }
}

void run_units(const Round& round, int64_t first, int64_t last, const Buffers& buffers) {
  const int64_t all = round.tiles_of_tokens();
  const int64_t unit_sums = all * 2 * kTileSums * 4;
  for (int64_t b = 0; b < round.args.shape.blocks(); b += kSlabBlocks) {
    for (int64_t unit = first; unit < last; ++unit) {
      run_slab(round, unit, b, buffers, buffers.sums + (unit - first) * unit_sums);
    }
  }
  for (int64_t unit = first; unit < last; ++unit) {
    const uint8_t* sums = buffers.sums + (unit - first) * unit_sums;
    for (int64_t at = 0; at < 2 * all; ++at) {
      store(round, (unit * 2 + at % 2) * kTileRows, at / 2, sums + at * kTileSums * 4);
    }
  }
}

// A thread's tile registers are its own as long as this lives.
class Entered {
 public:
  explicit Entered(const MatrixUnit& unit) : unit_(unit) { unit_.enter(); }
  ~Entered() { unit_.leave(); }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const MatrixUnit& unit_;
};

void run_round(Round& round) {
  gather(round);
  const int64_t units = ceil_div(round.args.shape.panels(), kUnitPanels);
  Pieces pieces(units, kSharedUnits);
  for_ranges(units, [&](int64_t begin, int64_t) {
    const Buffers buffers = thread_buffers(round);
    const Entered entered(round.unit);
    pieces.run(begin, [&](int64_t first, int64_t last, int64_t) { run_units(round, first, last, buffers); });
  });
}

}  // namespace

bool tiles_support(const LinearArgs& args) {
  // Groups of whole steps: where the unit's integers become floats.
  if (has_int8_activations(args.kind) && args.group % kBlockColumns != 0) return false;
  return !args.half && !is_dense(args.kind) && args.kind != Kind::kFp16;
}

void linear_tiles(const LinearArgs& args, const KernelTable& kernel, const MatrixUnit& unit) {
  for (int64_t start = 0; start < args.m; start += kRound) {
    Round round{args, kernel, unit, std::min(kRound, args.m - start), args.x + start * args.shape.k,
                args.y + start * args.shape.n};
    run_round(round);
  }
}

}  // namespace vllm_sparse
