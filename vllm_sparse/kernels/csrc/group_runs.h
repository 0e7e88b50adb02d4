// The scale groups that a slab runs through.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "kernel.h"

namespace vllm_sparse {
namespace {

// Runs of blocks whose halves (32 columns each) stay in the same scale groups, without dividing but once.
class GroupRuns {
 public:
  explicit GroupRuns(const Slab& slab) : group_(slab.group) {
    if (slab.scales == nullptr) return;
    for (int64_t h = 0; h < 2; ++h) {
      const int64_t column = slab.first * kBlockColumns + h * kChunk;
      const int64_t group = column / group_;
      scales_[h] = slab.scales + group * kPanelRows;
      left_[h] = (group + 1) * group_ - column;
    }
  }
  // Blocks until a half's group changes.
  int64_t blocks() const { return ceil_div(std::min(left_[0], left_[1]), kBlockColumns); }
  // The 8 scales of a half's group, or null if there are none.
  const float* scales(int half) const { return scales_[half]; }
  void advance(int64_t blocks) {
    if (scales_[0] == nullptr) return;
    for (int h = 0; h < 2; ++h) {
      left_[h] -= blocks * kBlockColumns;
      while (left_[h] <= 0) {
        left_[h] += group_;
        scales_[h] += kPanelRows;
      }
    }
  }

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 2;
  int64_t group_;
  const float* scales_[2] = {nullptr, nullptr};
  int64_t left_[2] = {kNever, kNever};  // columns of the group from the half's next ones on
};

}  // namespace
}  // namespace vllm_sparse
