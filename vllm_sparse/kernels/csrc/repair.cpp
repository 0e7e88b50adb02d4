#include "repair.h"

#include "kernel.h"

namespace vllm_sparse {
namespace {

bool is_kept(const LinearArgs& args, int64_t row, int64_t column) {
  const int64_t block = row / kPanelRows * args.shape.blocks() + column / kBlockColumns;
  const uint8_t* metadata = args.packed + block * block_bytes(args.kind);
  const int nibble = group_nibble(metadata, row % kPanelRows, column % kBlockColumns);
  return (nibble & 3) == column % 4 || nibble >> 2 == column % 4;
}

}  // namespace

void repair_token(const LinearArgs& args, const uint16_t* x, uint16_t* y) {
  const uint16_t exponent = args.half ? kExponentMask<true> : kExponentMask<false>;
  const uint16_t nan = exponent | (args.half ? 0x0200 : 0x0040);
  for (int64_t c = 0; c < args.shape.k; ++c) {
    const uint16_t magnitude = x[c] & 0x7FFF;
    if (magnitude < exponent) continue;
    for (int64_t row = 0; row < args.shape.n; ++row) {
      if (magnitude > exponent || !is_kept(args, row, c)) y[row] = nan;
    }
  }
}

}  // namespace vllm_sparse
