// From how many tokens on a matrix unit is faster, by timing both ways once; and whether it computes the same.
#include <algorithm>
#include <chrono>
#include <limits>
#include <mutex>
#include <stdexcept>
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

// Each pair of kept columns, as a byte of metadata: two nibbles i + 4j.
constexpr uint8_t kGroups[] = {0x84, 0x9C, 0xED};

// A value byte; bf16, whose values take two, is 1, 2, -1 and -2 in turn. Everything here is a small integer or a half.
uint8_t value_byte(Kind kind, size_t at) {
  constexpr uint16_t kBf16[] = {0x3F80, 0x4000, 0xBF80, 0xC000};
  constexpr uint8_t kFp8[] = {0x38, 0x40, 0xB0, 0xB8, 0x30};
  if (kind == Kind::kBf16) return kBf16[at / 2 % 4] >> (at % 2 * 8) & 0xFF;
  return kind == Kind::kFp8 ? kFp8[at % 5] : static_cast<uint8_t>(37 * at);
}

// A layer and tokens whose sums are exact in float32, so that both ways must agree to the bit.
class Sample {
 public:
  explicit Sample(Kind kind) : args_{} {
    args_.kind = kind;
    args_.shape = {kRows * std::max<int64_t>(1, torch::stable::get_num_threads()), kColumns};
    packed_.resize(args_.shape.packed_bytes(kind));
    for (size_t at = 0; at < packed_.size(); ++at) {
      const bool metadata = at % block_bytes(kind) < kMetadataBytes;
      packed_[at] = metadata ? kGroups[at % 3] : value_byte(kind, at);
    }
    constexpr uint16_t kTokens[] = {0x0000, 0x3F80, 0xC000, 0x4040, 0xC080};  // 0, 1, -2, 3, -4
    x_.resize(kMost * kColumns);
    for (size_t at = 0; at < x_.size(); ++at) x_[at] = kTokens[(at + at / kColumns) % 5];
    y_.resize(kMost * args_.shape.n);
    zeros_.assign(args_.shape.n, 0.0f);
    args_.packed = packed_.data();
    args_.x = x_.data();
    args_.y = y_.data();
    if (has_int8_activations(kind)) args_.correction = zeros_.data();
  }
  template <class Product>
  std::vector<uint16_t> outputs(const Product& product) {
    args_.m = kMost;
    product(args_);
    return y_;
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
  const auto on_unit = [&](const LinearArgs& args) { linear_tiles(args, kernel, unit); };
  if (sample.outputs(on_unit) != sample.outputs(linear_loops)) {
    throw std::runtime_error(
        "vllm_sparse: this processor's matrix unit gives other products than its vector units. Set "
        "VLLM_SPARSE_ISA=avx512bf16 to do without it, and please report the processor");
  }
  int64_t from = std::numeric_limits<int64_t>::max();
  for (int64_t m = kMost; m >= 2; m /= 2) {
    if (sample.time(m, on_unit) >= sample.time(m, linear_loops)) break;
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
