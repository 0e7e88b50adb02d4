// Blocking, threads and the rare non-finite activations; the arithmetic is in the level files.
#include "linear.h"

#include <algorithm>

#include "isa.h"
#include "kernel.h"
#include "parallel.h"
#include "parts.h"
#include "repair.h"

namespace vllm_sparse {
namespace {

// Tokens are processed in rounds, so that scratch memory stays bounded for long prompts.
constexpr int64_t kRound = 128;
// With one tile of tokens, weights stream once: an x slab of 16 KB leaves half of a 32 KB L1 to them.
constexpr int64_t kSlabBytes = 16 << 10;
constexpr int64_t kWholeBytes = 20 << 10;
// Decoded slabs are written and read back, dense ones read several times: neither should leave L1.
constexpr int64_t kDecodedBlocks = 16;
// With several tiles a group of panels shares each x slab while their own slabs stay in L2.
constexpr int64_t kTiledPanels = 8;
constexpr int64_t kSinglePanels = 16;
// Panels that a thread takes at a time, at least.
constexpr int64_t kPiecePanels = 8;

struct Blocking {
  int64_t blocks;  // of a slab, along K
  int64_t panels;  // that share an x slab
};

constexpr int64_t most_tokens(Kind kind) {
  if (kind == Kind::kDenseInt8) return kMaxDenseInt8Tile;
  if (kind == Kind::kInt4A8) return kMaxInt4A8Tile;
  return kind == Kind::kDense ? kMaxDenseTile : kMaxTile;
}

// Whether the loops take float32 instead of activations of 16 bits.
bool is_widened(const KernelTable& kernel, Kind kind) {
  return kernel.gather_wide != nullptr && !is_dense(kind) && !has_int8_activations(kind);
}

int64_t column_bytes(const KernelTable& kernel, Kind kind) {
  if (has_int8_activations(kind)) return 1;
  return is_widened(kernel, kind) ? kWideChunk / kChunk : 2;
}

Blocking choose_blocking(const KernelTable& kernel, Kind kind, Shape shape, Parts tiles) {
  const int64_t all = shape.blocks();
  const int64_t per_block = kBlockColumns * column_bytes(kernel, kind) * tiles.size(0);
  const bool shared = is_dense(kind) && tiles.total > 1;  // several passes over a slab
  const int64_t most = is_decoded(kind) || shared ? kDecodedBlocks : all;
  const int64_t slab = std::min({all, most, kSlabBytes / per_block});
  if (tiles.count() > 1) return {slab, kTiledPanels};
  if (!shared && (tiles.total == 1 || all * per_block <= kWholeBytes)) return {std::min(all, most), 1};
  return {slab, kSinglePanels};
}

struct Round {
  const LinearArgs& args;
  const KernelTable& kernel;
  Parts tiles;  // of tokens
  Blocking blocking;
  const uint8_t* x;          // gathered tiles, tile i at start(i) * padded_k columns
  const float* token_scale;  // with int8 activations
  int64_t start;             // its first token
  int64_t block_bytes() const { return vllm_sparse::block_bytes(args.kind); }
  const uint8_t* block(int64_t index) const { return args.packed + index * block_bytes(); }
};

SlabFn slab_of(const KernelTable& kernel, Kind kind) {
  if (kind == Kind::kDense) return kernel.slab_dense;
  if (kind == Kind::kDenseInt8) return kernel.slab_dense_int8;
  if (kind == Kind::kInt4A8) return kernel.slab_a4;
  return kind == Kind::kInt8A8 ? kernel.slab_a8 : kernel.slab;
}

StoreFn store_of(const KernelTable& kernel, Kind kind) {
  if (is_dense(kind)) return kernel.store_dense;
  if (kind == Kind::kInt4A8) return kernel.store_a4;
  return kind == Kind::kInt8A8 ? kernel.store_a8 : kernel.store;
}

void finish_panel(const Round& round, int64_t panel, int64_t tile, const float* acc) {
  const LinearArgs& args = round.args;
  const int64_t row = panel * kPanelRows;
  const auto of_row = [row](const float* values) { return values == nullptr ? nullptr : values + row; };
  const int64_t token = round.tiles.start(tile);
  const int64_t at = (round.start + token) * args.shape.n + row;
  Epilogue out{};
  out.scale = of_row(args.channel_scale);
  out.bias = of_row(args.bias);
  out.correction = of_row(args.correction);
  out.token_scale = round.token_scale == nullptr ? nullptr : round.token_scale + token;
  if (args.wide != nullptr) {
    out.wide = args.wide + at;
  } else {
    out.y = args.y + at;
  }
  out.ldy = args.shape.n;
  out.rows = static_cast<int>(std::min(kPanelRows, args.shape.n - row));
  store_of(round.kernel, args.kind)(acc, round.tiles.size(tile), out);
}

// A group of panels [first, last); `following` is where the thread's next group starts, as far as known, or -1.
struct PanelGroup {
  int64_t first, last, following;
};

// The slab worth prefetching while (panel, b) is read for the last time: with one tile the slab that follows in
// order, with several the same panel's next slab. Null at the end.
const uint8_t* next_slab(const Round& round, PanelGroup group, int64_t panel, int64_t b) {
  const int64_t all = round.args.shape.blocks();
  const int64_t step = round.blocking.blocks;
  const bool one_tile = round.tiles.count() == 1;
  if (one_tile && panel + 1 < group.last) return round.block((panel + 1) * all + b);
  if (b + step < all) return round.block((one_tile ? group.first : panel) * all + b + step);
  if (group.following < 0) return nullptr;
  const int64_t next = group.following + (one_tile ? 0 : panel - group.first);
  return next < round.args.shape.panels() ? round.block(next * all) : nullptr;
}

// One thread's buffers, for one group of panels.
struct Buffers {
  float* acc;        // [panel][tile][pair][token][16]
  uint8_t* decoded;  // [panel][slab], for kinds that are decoded
};

Decode decode_of(const Round& round, int64_t panel, int64_t b, int64_t blocks, const uint8_t* next) {
  const LinearArgs& args = round.args;
  return {args.kind, round.block(panel * args.shape.blocks() + b), next, blocks, panel_scales(args, panel),
          args.group, b, nullptr};
}

bool decodes_in_registers(const Round& round) {
  const LinearArgs& args = round.args;
  const KernelTable& kernel = round.kernel;
  return is_decoded(args.kind) && kernel.direct != nullptr &&
         round.tiles.total <= kernel.direct_tokens(args.kind, args.group_scale != nullptr);
}

void run_slabs(const Round& round, PanelGroup group, int64_t b, const Buffers& buffers) {
  const Shape shape = round.args.shape;
  const Kind kind = round.args.kind;
  const int64_t blocks = std::min(round.blocking.blocks, shape.blocks() - b);
  const SlabFn run = slab_of(round.kernel, kind);
  const int64_t slab_bytes = round.blocking.blocks * kWideBlockBytes;
  const bool in_registers = decodes_in_registers(round);
  for (int64_t tile = 0; tile < round.tiles.count(); ++tile) {
    const int64_t start = round.tiles.start(tile);
    const int size = round.tiles.size(tile);
    const bool last_use = tile + 1 == round.tiles.count();
    Slab slab{};
    slab.blocks = blocks;
    slab.tokens = size;
    slab.fresh = b == 0;
    slab.group = round.args.group;
    slab.first = b;
    slab.x = round.x + (start * shape.padded_k() + b * kBlockColumns * size) * column_bytes(round.kernel, kind);
    for (int64_t panel = group.first; panel < group.last; ++panel) {
      const int64_t at = panel - group.first;
      float* acc = buffers.acc + (at * round.tiles.total + start) * accumulators(kind);
      if (is_decoded(kind)) {
        Decode decode = decode_of(round, panel, b, blocks, next_slab(round, group, panel, b));
        decode.out = buffers.decoded + (round.tiles.count() > 1 ? at : 0) * slab_bytes;
        if (in_registers) {
          round.kernel.direct(decode, slab.x, size, slab.fresh, acc);
        } else if (tile == 0) {
          round.kernel.decode(decode);
        }
        slab.packed = decode.out;
      } else {
        slab.packed = round.block(panel * shape.blocks() + b);
        slab.scales = panel_scales(round.args, panel);
        // One token streams at the memory's pace without help, but where much is computed for each byte.
        const bool helped = round.tiles.total > 1 || kind == Kind::kInt4A8;
        slab.next = last_use && helped ? next_slab(round, group, panel, b) : nullptr;
      }
      if (!in_registers) run(slab, acc);
      if (b + blocks == shape.blocks()) finish_panel(round, panel, tile, acc);
    }
  }
}

// This thread's buffers; they live as long as the thread.
Buffers thread_buffers(const Round& round) {
  thread_local Scratch acc_scratch;
  thread_local Scratch decoded_scratch;
  const Blocking blocking = round.blocking;
  Buffers buffers{};
  buffers.acc = acc_scratch.get<float>(blocking.panels * round.tiles.total * accumulators(round.args.kind));
  if (is_decoded(round.args.kind)) {
    buffers.decoded = decoded_scratch.get<uint8_t>(blocking.panels * blocking.blocks * kWideBlockBytes);
  }
  return buffers;
}

void run_group(const Round& round, PanelGroup group, const Buffers& buffers) {
  const int64_t blocks = round.args.shape.blocks();
  for (int64_t b = 0; b < blocks; b += round.blocking.blocks) run_slabs(round, group, b, buffers);
}

// Panels go to the thread that first touched them, as long as it keeps up with the others.
void run_panels(const Round& round) {
  const int64_t panels = round.args.shape.panels();
  const int64_t step = round.blocking.panels;
  Pieces pieces(panels, ceil_div(kPiecePanels, step) * step);
  for_ranges(panels, [&](int64_t begin, int64_t) {
    const Buffers buffers = thread_buffers(round);
    pieces.run(begin, [&](int64_t piece, int64_t end, int64_t following) {
      for (int64_t first = piece; first < end; first += step) {
        const int64_t last = std::min(end, first + step);
        run_group(round, {first, last, last < end ? last : following}, buffers);
      }
    });
  });
}

// The round's activations in the kernels' order; which tiles hold non-finite values.
struct Activations {
  const uint8_t* x;
  float token_scale[kRound];
  bool special[kRound];
};

void gather_round(const LinearArgs& args, const KernelTable& kernel, Parts tiles, const uint16_t* x,
                  Activations& out) {
  thread_local Scratch scratch;
  const Shape shape = args.shape;
  const bool quantized = has_int8_activations(args.kind);
  const QuantizeFn quantize = args.kind == Kind::kInt4A8 ? kernel.quantize_a4 : kernel.quantize;
  // A single row of whole chunks already has the order of a tile.
  const bool wide = is_widened(kernel, args.kind);
  const bool direct = !quantized && !wide && tiles.total == 1 && shape.k % kBlockColumns == 0;
  const GatherFn gather = wide ? kernel.gather_wide : kernel.gather;
  const int64_t row_bytes = shape.padded_k() * column_bytes(kernel, args.kind);
  uint8_t* gathered = direct ? nullptr : scratch.get<uint8_t>(tiles.total * row_bytes);
  out.x = direct ? reinterpret_cast<const uint8_t*>(x) : gathered;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = tiles.start(i);
      const Tile tile{x + at * shape.k, shape.k, tiles.size(i)};
      uint8_t* target = direct ? nullptr : gathered + at * row_bytes;
      out.special[i] = false;
      if (quantized) {
        quantize(tile, target, out.token_scale + at);
      } else {
        out.special[i] = gather(tile, target);
      }
    }
  };
  if (tiles.count() > 1) {
    for_ranges(tiles.count(), body);
  } else {
    body(0, 1);
  }
}

void run_round(const LinearArgs& args, const KernelTable& kernel, int64_t start, int64_t tokens) {
  const Shape shape = args.shape;
  const Parts tiles{tokens, most_tokens(args.kind)};
  const uint16_t* x = args.x + start * shape.k;
  Activations activations;
  gather_round(args, kernel, tiles, x, activations);
  const float* token_scale = has_int8_activations(args.kind) ? activations.token_scale : nullptr;
  const Round round{args,          kernel,      tiles,
                    choose_blocking(kernel, args.kind, shape, tiles), activations.x, token_scale,
                    start};
  run_panels(round);
  for (int64_t i = 0; i < tiles.count() && !is_dense(args.kind); ++i) {
    if (!activations.special[i]) continue;
    for (int64_t t = tiles.start(i); t < tiles.start(i + 1); ++t) {
      repair_token(args, x + t * shape.k, args.y + (start + t) * shape.n);
    }
  }
}

}  // namespace

void set_scales(LinearArgs& args, const float* scale, int64_t group) {
  const int64_t groups = group > 0 ? ceil_div(args.shape.padded_k(), group) : 1;
  if (has_int8_activations(args.kind)) args.correction = scale + groups * args.shape.padded_n();
  if (group > 0) {
    args.group_scale = scale;
    args.group = group;
  } else {
    args.channel_scale = scale;
  }
}

void linear_loops(const LinearArgs& args) {
  const KernelTable& kernel = args.half ? kernels().fp16 : kernels().bf16;
  for (int64_t start = 0; start < args.m; start += kRound) {
    run_round(args, kernel, start, std::min(kRound, args.m - start));
  }
}

void linear(const LinearArgs& args) {
  const ManyTokens* way = many_tokens();
  if (way != nullptr && way->supports(args) && args.m >= way->from(*way, args.kind)) {
    return way->linear(args);
  }
  linear_loops(args);
}

}  // namespace vllm_sparse
