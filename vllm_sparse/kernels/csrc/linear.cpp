// Blocking, threads and the rare non-finite activations; the arithmetic is in the level files.
#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "kernel.h"
#include "parallel.h"

namespace vllm_sparse {
namespace {

// Tokens are processed in rounds, so that scratch memory stays bounded for long prompts.
constexpr int64_t kRound = 256;
// With one tile of tokens, weights stream once: an x slab of 16 KB leaves half of a 32 KB L1 to them.
constexpr int64_t kSlabBytes = 16 << 10;
constexpr int64_t kWholeBytes = 20 << 10;
// With several tiles a group of panels shares each x slab while their own slabs stay in L2.
constexpr int64_t kTiledPanels = 4;
constexpr int64_t kSinglePanels = 16;

// A round's tokens in tiles of nearly equal size.
struct Tiles {
  int64_t tokens;
  int64_t count() const { return ceil_div(tokens, kMaxTile); }
  int64_t start(int64_t i) const { return i * (tokens / count()) + std::min(i, tokens % count()); }
  int size(int64_t i) const { return static_cast<int>(start(i + 1) - start(i)); }
};

struct Blocking {
  int64_t blocks;  // of a slab, along K
  int64_t panels;  // that share an x slab
};

Blocking choose_blocking(Shape shape, Tiles tiles) {
  const int64_t all = shape.blocks();
  const int64_t per_block = kBlockColumns * sizeof(uint16_t) * tiles.size(0);
  const int64_t slab = std::min(all, kSlabBytes / per_block);
  if (tiles.count() > 1) return {slab, kTiledPanels};
  if (tiles.tokens == 1 || all * per_block <= kWholeBytes) return {all, 1};
  return {slab, kSinglePanels};
}

struct Round {
  const LinearArgs& args;
  const FloatKernel& kernel;
  Tiles tiles;
  Blocking blocking;
  const uint16_t* x;  // gathered tiles, tile i at start(i) * padded_k
  uint16_t* y;
};

void finish_panel(const Round& round, int64_t panel, int64_t tile, const float* acc) {
  const LinearArgs& args = round.args;
  const int64_t row = panel * kPanelRows;
  Epilogue out{};
  out.bias = args.bias == nullptr ? nullptr : args.bias + row;
  out.y = round.y + round.tiles.start(tile) * args.shape.n + row;
  out.ldy = args.shape.n;
  out.rows = static_cast<int>(std::min(kPanelRows, args.shape.n - row));
  round.kernel.store(acc, round.tiles.size(tile), out);
}

// A group of panels [first, last) of a thread's range that ends at `end`.
struct PanelGroup {
  int64_t first, last, end;
};

// Index of the block that begins the slab worth prefetching while (panel, b) is used for the last time: with
// one tile the slab that follows in order, with several the same panel's next slab. -1 at the end.
int64_t next_slab(const Round& round, PanelGroup group, int64_t panel, int64_t b) {
  const int64_t all = round.args.shape.blocks();
  const int64_t step = round.blocking.blocks;
  const bool one_tile = round.tiles.count() == 1;
  if (one_tile && panel + 1 < group.last) return (panel + 1) * all + b;
  if (b + step < all) return (one_tile ? group.first : panel) * all + b + step;
  const int64_t next = one_tile ? group.last : panel + round.blocking.panels;
  return next < group.end ? next * all : -1;
}

void run_panels(const Round& round, int64_t begin, int64_t end) {
  thread_local Scratch scratch;
  const Shape shape = round.args.shape;
  const Blocking blocking = round.blocking;
  const int64_t bytes = block_bytes(round.args.kind);
  const int64_t tokens = round.tiles.tokens;
  float* acc = scratch.get<float>(blocking.panels * tokens * kAccFloats);
  for (int64_t first = begin; first < end; first += blocking.panels) {
    const int64_t last = std::min(end, first + blocking.panels);
    for (int64_t b = 0; b < shape.blocks(); b += blocking.blocks) {
      const int64_t blocks = std::min(blocking.blocks, shape.blocks() - b);
      for (int64_t tile = 0; tile < round.tiles.count(); ++tile) {
        const int64_t start = round.tiles.start(tile);
        const int size = round.tiles.size(tile);
        const uint16_t* x = round.x + start * shape.padded_k() + b * kBlockColumns * size;
        for (int64_t panel = first; panel < last; ++panel) {
          float* sums = acc + ((panel - first) * tokens + start) * kAccFloats;
          const int64_t at = panel * shape.blocks() + b;
          const int64_t next = tokens == 1 || tile + 1 < round.tiles.count()
                                   ? -1
                                   : next_slab(round, {first, last, end}, panel, b);
          const uint8_t* packed = round.args.packed;
          round.kernel.slab({packed + at * bytes, next < 0 ? nullptr : packed + next * bytes, blocks, x, size, b == 0},
                            sums);
          if (b + blocks == shape.blocks()) finish_panel(round, panel, tile, sums);
        }
      }
    }
  }
}

bool is_kept(const LinearArgs& args, int64_t row, int64_t column) {
  const int64_t block = row / kPanelRows * args.shape.blocks() + column / kBlockColumns;
  const uint8_t* metadata = args.packed + block * block_bytes(args.kind);
  const SlotPlace place = slot_place(row % kPanelRows, column % kBlockColumns / 4 * 2);
  const int nibble = metadata[8 * place.unit + place.word / 4] >> (2 * (place.word % 4)) & 15;
  return (nibble & 3) == column % 4 || nibble >> 2 == column % 4;
}

// A dense product multiplies pruned weights too: 0 * NaN and 0 * infinity are NaN. Give such tokens what
// dense would: rows that do not keep a non-finite column become NaN, and a NaN reaches every row.
void repair_token(const LinearArgs& args, const uint16_t* x, uint16_t* y) {
  const bool half = args.kind == Kind::kFp16;
  const uint16_t exponent = half ? kExponentMask<true> : kExponentMask<false>;
  const uint16_t nan = exponent | (half ? 0x0200 : 0x0040);
  for (int64_t c = 0; c < args.shape.k; ++c) {
    const uint16_t magnitude = x[c] & 0x7FFF;
    if (magnitude < exponent) continue;
    for (int64_t row = 0; row < args.shape.n; ++row) {
      if (magnitude > exponent || !is_kept(args, row, c)) y[row] = nan;
    }
  }
}

void run_round(const LinearArgs& args, const FloatKernel& kernel, int64_t start, int64_t tokens) {
  thread_local Scratch scratch;
  const Shape shape = args.shape;
  const Tiles tiles{tokens};
  const uint16_t* x = args.x + start * shape.k;
  const bool direct = tokens == 1 && shape.k % kBlockColumns == 0;
  uint16_t* gathered = direct ? nullptr : scratch.get<uint16_t>(tokens * shape.padded_k());
  uint8_t special[kRound] = {};
  const auto gather = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = tiles.start(i);
      uint16_t* target = direct ? nullptr : gathered + at * shape.padded_k();
      special[i] = kernel.gather(x + at * shape.k, shape.k, shape.k, tiles.size(i), target);
    }
  };
  if (tiles.count() > 1) {
    for_ranges(tiles.count(), gather);
  } else {
    gather(0, 1);
  }
  const Round round{args, kernel, tiles, choose_blocking(shape, tiles), direct ? x : gathered,
                    args.y + start * shape.n};
  for_ranges(shape.panels(), [&](int64_t begin, int64_t end) { run_panels(round, begin, end); });
  for (int64_t i = 0; i < tiles.count(); ++i) {
    if (special[i] == 0) continue;
    for (int64_t t = tiles.start(i); t < tiles.start(i + 1); ++t) {
      repair_token(args, x + t * shape.k, round.y + t * shape.n);
    }
  }
}

}  // namespace

void linear(const LinearArgs& args) {
  const FloatKernel& kernel = args.kind == Kind::kFp16 ? kernels().fp16 : kernels().bf16;
  for (int64_t start = 0; start < args.m; start += kRound) {
    run_round(args, kernel, start, std::min(kRound, args.m - start));
  }
}

}  // namespace vllm_sparse
