// Blocking and threads for token lanes.
#include "token_lanes.h"

#include <algorithm>

#include "activations.h"
#include "parallel.h"
#include "parts.h"
#include "repair.h"

namespace vllm_sparse {
namespace {

// Planes that share one expansion of the weights, and panels that share columns: a block's columns, the entries and the
// sums stay in L2.
constexpr int64_t kRoundPlanes = 24;
constexpr int64_t kSharedPanels = 32;
// Blocks that are decoded to 16 bits at a time.
constexpr int64_t kDecodedBlocks = 4;
constexpr int64_t kRound = kRoundPlanes * kPlaneTokens;

// Some tokens of a call, and their activations as columns.
struct Round {
  const LinearArgs& args;
  const KernelTable& kernel;
  const TokenLanes& lanes;
  int64_t start, tokens;
  uint8_t* columns = nullptr;       // [block][plane][column][8 tokens]
  float token_scale[kRound] = {};   // with int8 activations
  bool special[kRoundPlanes] = {};  // planes with tokens that are not finite

  bool bytes() const { return has_int8_activations(args.kind); }
  int64_t planes() const { return ceil_div(tokens, kPlaneTokens); }
  int size(int64_t plane) const { return static_cast<int>(std::min(kPlaneTokens, tokens - plane * kPlaneTokens)); }
  int64_t block_bytes() const { return planes() * lanes.plane_bytes(); }
  int64_t token(int64_t plane) const { return start + plane * kPlaneTokens; }
};

const TokenLanes& lanes_of(const LaneTable& table, Kind kind) {
  if (kind == Kind::kInt4A8) return table.a4;
  return kind == Kind::kInt8A8 ? table.a8 : table.wide;
}

// ---- Activations ---------------------------------------------------------------------------------------------

void gather_plane(Round& round, int64_t plane, uint8_t* rows) {
  const Shape shape = round.args.shape;
  const Tile tile{round.args.x + round.token(plane) * shape.k, shape.k, round.size(plane)};
  if (round.bytes()) {
    round.kernel.quantize(tile, rows, round.token_scale + plane * kPlaneTokens);
  } else {
    round.special[plane] = round.kernel.gather(tile, rows);
  }
  uint8_t* const target = round.columns + plane * round.lanes.plane_bytes();
  round.lanes.to_columns(rows, tile.tokens, shape.blocks(), target, round.block_bytes());
}

void gather(Round& round) {
  thread_local Scratch columns_scratch;
  const Shape shape = round.args.shape;
  round.columns = columns_scratch.get<uint8_t>(shape.blocks() * round.block_bytes());
  for_ranges(round.planes(), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    uint8_t* rows = scratch.get<uint8_t>(kPlaneTokens * shape.padded_k() * (round.bytes() ? 1 : 2));
    for (int64_t plane = begin; plane < end; ++plane) gather_plane(round, plane, rows);
  });
}

// ---- Products ------------------------------------------------------------------------------------------------

// One thread's, for some panels that share columns.
struct Buffers {
  uint8_t* decoded;  // [panel][block of 16 bits], of a run of blocks
  uint8_t* entries;  // [panel], of one block
  float* sums;       // [tile of planes][panel][row][plane][8 tokens]
};

Buffers thread_buffers(const Round& round) {
  thread_local Scratch decoded, entries, sums;
  Buffers buffers{};
  if (is_decoded(round.args.kind)) {
    buffers.decoded = decoded.get<uint8_t>(kSharedPanels * kDecodedBlocks * kWideBlockBytes);
  }
  buffers.entries = entries.get<uint8_t>(kSharedPanels * round.lanes.entry_bytes());
  buffers.sums = sums.get<float>(kSharedPanels * kPanelRows * round.planes() * kPlaneTokens);
  return buffers;
}

// Panels that share columns, and what a thread has of them.
struct Group {
  int64_t first, last;
  Buffers buffers;

  // Where the sums of a panel start for a tile of `planes` planes from `plane` on.
  float* sums(int64_t panel, int64_t plane, int64_t planes) const {
    return buffers.sums + (plane * (last - first) + (panel - first) * planes) * kPanelRows * kPlaneTokens;
  }
};

// The panel's block b of 16 bits; several are decoded at a time, so that tables made from scales last.
const uint8_t* decoded_block(const Round& round, const Group& group, int64_t panel, int64_t b) {
  const LinearArgs& args = round.args;
  uint8_t* const decoded = group.buffers.decoded + (panel - group.first) * kDecodedBlocks * kWideBlockBytes;
  const int64_t at = b % kDecodedBlocks;
  if (at == 0) {
    const int64_t bytes = block_bytes(args.kind);
    const int64_t blocks = std::min(kDecodedBlocks, args.shape.blocks() - b);
    const uint8_t* const packed = args.packed + (panel * args.shape.blocks() + b) * bytes;
    const uint8_t* const next = b + 2 * blocks <= args.shape.blocks() ? packed + blocks * bytes : nullptr;
    round.kernel.decode({args.kind, packed, next, blocks, panel_scales(args, panel), args.group, b, decoded});
  }
  return decoded + at * kWideBlockBytes;
}

const uint8_t* packed_block(const Round& round, int64_t panel, int64_t b) {
  const LinearArgs& args = round.args;
  const int64_t bytes = block_bytes(args.kind);
  const uint8_t* const block = args.packed + (panel * args.shape.blocks() + b) * bytes;
  if (b + 1 < args.shape.blocks()) prefetch_block<1>(block + bytes, bytes, 0);
  return block;
}

// The at-th of `parts` parts of some columns, to L2.
void prefetch_part(const uint8_t* columns, int64_t bytes, int64_t at, int64_t parts) {
  const int64_t lines = ceil_div(ceil_div(bytes, kLine), parts);
  for (int64_t line = at * lines; line < (at + 1) * lines; ++line) __builtin_prefetch(columns + line * kLine, 0, 2);
}

// Block b of all panels times all planes.
void run_block(const Round& round, const Group& group, int64_t b) {
  const LinearArgs& args = round.args;
  const bool scaled = args.kind == Kind::kInt4A8 && args.group_scale != nullptr;
  const int64_t scales = scaled ? b * kBlockColumns / args.group * kPanelRows : 0;
  const Parts tiles{round.planes(), kMostPlanes};
  for (int64_t i = 0; i < tiles.count(); ++i) {
    LaneProduct product{};
    product.columns = round.columns + b * round.block_bytes() + tiles.start(i) * round.lanes.plane_bytes();
    product.planes = tiles.size(i);
    product.fresh = b == 0;
    for (int64_t panel = group.first; panel < group.last; ++panel) {
      // With one tile, entries are used while they are in L1.
      const int64_t at = tiles.count() > 1 ? panel - group.first : 0;
      uint8_t* const entries = group.buffers.entries + at * round.lanes.entry_bytes();
      if (i == 0) {
        const bool decoded = is_decoded(args.kind);
        round.lanes.expand(decoded ? decoded_block(round, group, panel, b) : packed_block(round, panel, b), entries);
      }
      product.entries = entries;
      product.sums = group.sums(panel, tiles.start(i), product.planes);
      product.scales = scaled ? panel_scales(args, panel) + scales : nullptr;
      round.lanes.multiply(product);
      // The next tile's, which lie behind these.
      const int64_t bytes = product.planes * round.lanes.plane_bytes();
      prefetch_part(product.columns + bytes, bytes, panel - group.first, group.last - group.first);
    }
  }
}

// A panel's sums of a tile of `planes` planes from `start` on.
void store_tile(const Round& round, int64_t panel, int64_t start, int64_t planes, const float* sums) {
  const LinearArgs& args = round.args;
  const int64_t row = panel * kPanelRows;
  Epilogue out{};
  if (args.channel_scale != nullptr) out.scale = args.channel_scale + row;
  if (args.bias != nullptr) out.bias = args.bias + row;
  out.ldy = args.shape.n;
  out.rows = static_cast<int>(std::min(kPanelRows, args.shape.n - row));
  for (int64_t plane = start; plane < start + planes; ++plane, sums += kPlaneTokens) {
    out.y = args.y + round.token(plane) * args.shape.n + row;
    out.token_scale = round.bytes() ? round.token_scale + plane * kPlaneTokens : nullptr;
    round.lanes.store(sums, planes * kPlaneTokens, round.size(plane), out);
  }
}

void run_group(const Round& round, const Group& group) {
  for (int64_t b = 0; b < round.args.shape.blocks(); ++b) run_block(round, group, b);
  const Parts tiles{round.planes(), kMostPlanes};
  for (int64_t i = 0; i < tiles.count(); ++i) {
    for (int64_t panel = group.first; panel < group.last; ++panel) {
      store_tile(round, panel, tiles.start(i), tiles.size(i), group.sums(panel, tiles.start(i), tiles.size(i)));
    }
  }
}

void run_round(Round& round) {
  gather(round);
  const int64_t panels = round.args.shape.panels();
  Pieces pieces(panels, kSharedPanels);
  for_ranges(panels, [&](int64_t begin, int64_t) {
    const Buffers buffers = thread_buffers(round);
    pieces.run(begin, [&](int64_t first, int64_t last, int64_t) { run_group(round, {first, last, buffers}); });
  });
  for (int64_t plane = 0; plane < round.planes(); ++plane) {
    for (int64_t t = 0; round.special[plane] && t < round.size(plane); ++t) {
      const int64_t token = round.token(plane) + t;
      repair_token(round.args, round.args.x + token * round.args.shape.k, round.args.y + token * round.args.shape.n);
    }
  }
}

}  // namespace

bool lanes_support(const KernelTable& kernel, const LinearArgs& args) {
  if (kernel.lanes == nullptr || is_dense(args.kind)) return false;
  // Groups of whole blocks: where sums of integers are scaled.
  return !has_int8_activations(args.kind) || args.group % kBlockColumns == 0;
}

void linear_lanes(const LinearArgs& args, const KernelTable& kernel) {
  const Parts rounds{ceil_div(args.m, kPlaneTokens), kRoundPlanes};
  for (int64_t i = 0; i < rounds.count(); ++i) {
    const int64_t start = rounds.start(i) * kPlaneTokens;
    Round round{args, kernel, lanes_of(*kernel.lanes, args.kind), start,
                std::min(args.m - start, rounds.size(i) * kPlaneTokens)};
    run_round(round);
  }
}

}  // namespace vllm_sparse
