// Timing both ways once, and whether they compute the same.
#include "many_tokens.h"

#include <algorithm>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "pack.h"
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

// 1, 2, -1 and -2.
constexpr uint16_t kBf16Values[] = {0x3F80, 0x4000, 0xBF80, 0xC000};
constexpr uint16_t kFp16Values[] = {0x3C00, 0x4000, 0xBC00, 0xC000};
// 0, 1, -2, 3 and -4.
constexpr uint16_t kBf16Tokens[] = {0x0000, 0x3F80, 0xC000, 0x4040, 0xC080};
constexpr uint16_t kFp16Tokens[] = {0x0000, 0x3C00, 0xC000, 0x4200, 0xC400};

// A byte of the values; those of 16 bits take two. Everything here is a small integer or a half.
uint8_t value_byte(Kind kind, size_t at) {
  constexpr uint8_t kFp8[] = {0x38, 0x40, 0xB0, 0xB8, 0x30};
  if (is_wide(kind)) return (kind == Kind::kFp16 ? kFp16Values : kBf16Values)[at / 2 % 4] >> (at % 2 * 8) & 0xFF;
  return kind == Kind::kFp8 ? kFp8[at % 5] : static_cast<uint8_t>(37 * at);
}

// 128 times the sum of each row's integers.
std::vector<float> offset_sums(Kind kind, Shape shape, const uint8_t* packed) {
  std::vector<uint8_t> dense(shape.n * shape.k);
  unpack(kind, shape, packed, dense.data());
  std::vector<float> sums(shape.padded_n(), 0.0f);
  for (size_t at = 0; at < dense.size(); ++at) sums[at / shape.k] += 128.0f * static_cast<int8_t>(dense[at]);
  return sums;
}

// A layer and tokens whose sums are exact in float32, so that both ways must agree to the bit.
class Sample {
 public:
  explicit Sample(Kind kind) : args_{} {
    args_.kind = kind;
    args_.half = kind == Kind::kFp16;
    args_.shape = {kRows * std::max<int64_t>(1, torch::stable::get_num_threads()), kColumns};
    packed_.resize(args_.shape.packed_bytes(kind));
    for (size_t at = 0; at < packed_.size(); ++at) {
      const bool metadata = at % block_bytes(kind) < kMetadataBytes;
      packed_[at] = metadata ? kGroups[at % 3] : value_byte(kind, at);
    }
    const uint16_t(&tokens)[5] = args_.half ? kFp16Tokens : kBf16Tokens;
    x_.resize(kMost * kColumns);
    for (size_t at = 0; at < x_.size(); ++at) x_[at] = tokens[(at + at / kColumns) % 5];
    y_.resize(kMost * args_.shape.n);
    args_.packed = packed_.data();
    args_.x = x_.data();
    args_.y = y_.data();
    if (!has_int8_activations(kind)) return;
    corrections_ = offset_sums(kind, args_.shape, packed_.data());
    args_.correction = corrections_.data();
  }
  template <class Product>
  std::vector<uint16_t> outputs(const Product& product) {
    args_.m = kMost;
    product(args_);
    return y_;
  }
  // Whether `product` is faster than `other` with m tokens: by the shortest of some calls, which take turns.
  template <class Product, class Other>
  bool is_faster(int64_t m, const Product& product, const Other& other) {
    args_.m = m;
    auto best = std::chrono::nanoseconds::max(), best_other = best;
    for (int i = 0; i < kRepeats; ++i) {
      best = std::min(best, time(product));
      best_other = std::min(best_other, time(other));
    }
    return best < best_other;
  }

 private:
  template <class Product>
  std::chrono::nanoseconds time(const Product& product) {
    const auto start = std::chrono::steady_clock::now();
    product(args_);
    return std::chrono::steady_clock::now() - start;
  }

  LinearArgs args_;
  std::vector<uint8_t> packed_;
  std::vector<uint16_t> x_, y_;
  std::vector<float> corrections_;
};

}  // namespace

int64_t measure_many_tokens(const ManyTokens& way, Kind kind) {
  Sample sample(kind);
  if (sample.outputs(way.linear) != sample.outputs(linear_loops)) {
    throw std::runtime_error(std::string("vllm_sparse: on this processor the products of ") + way.name +
                             " differ from those of its vector loops. Set VLLM_SPARSE_ISA to a lower level to do "
                             "without, and please report the processor");
  }
  int64_t from = kNever;
  for (int64_t m = kMost; m >= 2; m /= 2) {
    if (!sample.is_faster(m, way.linear, linear_loops)) break;
    from = m;
  }
  return from;
}

int64_t measured_once(const ManyTokens& way, Kind kind) {
  static std::once_flag once[kKinds];
  static int64_t from[kKinds];
  const int index = static_cast<int>(kind);
  std::call_once(once[index], [&] { from[index] = measure_many_tokens(way, kind); });
  return from[index];
}

}  // namespace vllm_sparse
