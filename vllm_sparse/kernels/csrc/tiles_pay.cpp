// From how many tokens on a matrix unit is faster, by timing both ways once.
#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace vllm_sparse {
namespace {

// Rows for each thread and columns: weights that stay in L2, so that memory does not decide.
constexpr int64_t kRows = 256;
constexpr int64_t kColumns = 1024;
constexpr int64_t kMost = 128;
constexpr int kRepeats = 5;

// A layer of zeros whose groups keep their first two columns; times do not depend on values.
class Sample {
 public:
  explicit Sample(Kind kind) : args_{} {
    args_.kind = kind;
    args_.shape = {kRows * std::max<int64_t>(1, torch::stable::get_num_threads()), kColumns};
    packed_.assign(args_.shape.packed_bytes(kind), 0);
    for (size_t at = 0; at < packed_.size(); at += block_bytes(kind)) {
      std::fill_n(packed_.begin() + at, kMetadataBytes, uint8_t{0x44});
    }
    x_.assign(kMost * kColumns, 0);
    y_.resize(kMost * args_.shape.n);
    zeros_.assign(args_.shape.n, 0.0f);
    args_.packed = packed_.data();
    args_.x = x_.data();
    args_.y = y_.data();
    if (has_int8_activations(kind)) args_.correction = zeros_.data();
  }
  // The shortest of some calls of `product` with m tokens.
  template <class Product>
  std::chrono::nanoseconds time(int64_t m, const Product& product) {
    args_.m = m;
    auto best = std::chrono::nanoseconds::max();
    for (int i = 0; i < kRepeats; ++i) {
      const auto start = std::chrono::steady_clock::now();
      product(args_);
      const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - start;
      best = std::min(best, took);
    }
    return best;
  }

 private:
  LinearArgs args_;
  std::vector<uint8_t> packed_;
  std::vector<uint16_t> x_, y_;
  std::vector<float> zeros_;
};

}  // namespace

int64_t measure_tiles(const MatrixUnit& unit, Kind kind) {
  Sample sample(kind);
  const KernelTable& kernel = kernels().bf16;
  int64_t from = std::numeric_limits<int64_t>::max();
  for (int64_t m = kMost; m >= 2; m /= 2) {
    const auto with_unit = sample.time(m, [&](const LinearArgs& args) { linear_tiles(args, kernel, unit); });
    const auto loops = sample.time(m, [](const LinearArgs& args) { linear_loops(args); });
    if (with_unit >= loops) break;
    from = m;
  }
  return from;
}

int64_t tiles_pay_from(const MatrixUnit& unit, Kind kind) {
  if (unit.for_any_count) return 1;
  static std::once_flag once[kKinds];
  static int64_t from[kKinds];
  const int index = static_cast<int>(kind);
  std::call_once(once[index], [&] { from[index] = measure_tiles(unit, kind); });
  return from[index];
}

}  // namespace vllm_sparse
