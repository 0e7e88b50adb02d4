#include "pages.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <mutex>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vllm_sparse {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kHuge = int64_t{2} << 20;
// Untouched memory costs nothing, so the block that small vectors share may be generous.
constexpr int64_t kShared = int64_t{64} << 20;
constexpr int64_t kAlign = 4096;

constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// A block of whole 2 MB pages, and how much of it is taken.
struct Block {
  Tensor memory;
  int64_t start;  // of the first whole page
  int64_t size;
  int64_t taken;
};

Block make_block(const Tensor& like, int64_t size) {
  const std::array<int64_t, 1> bytes{size + kHuge};
  Tensor memory = torch::stable::new_empty(like, {bytes.data(), bytes.size()}, ScalarType::Byte);
  auto* const data = static_cast<uint8_t*>(memory.mutable_data_ptr());
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  const int64_t start = round_up(address, kHuge) - address;
#if defined(MADV_HUGEPAGE)
  (void)madvise(data + start, static_cast<size_t>(size), MADV_HUGEPAGE);
#endif
  return {memory, start, size, 0};
}

Tensor take(Block& block, int64_t bytes) {
  const int64_t at = block.start + block.taken;
  block.taken += round_up(bytes, kAlign);
  return torch::stable::narrow(block.memory, 0, at, bytes);
}

}  // namespace

Tensor huge_bytes(const Tensor& like, int64_t bytes) {
  if (round_up(bytes, kAlign) > kShared / 2) {
    Block own = make_block(like, round_up(bytes, kHuge));
    return take(own, bytes);
  }
  static std::mutex mutex;
  static std::optional<Block>& shared = *new std::optional<Block>();  // never destroyed: torch may be gone by then
  const std::lock_guard<std::mutex> lock(mutex);
  if (!shared || shared->taken + round_up(bytes, kAlign) > shared->size) shared = make_block(like, kShared);
  return take(*shared, bytes);
}

void join_pages(const uint8_t* data, int64_t bytes) {
#if defined(__linux__)
  constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; older headers lack the name
  const auto address = reinterpret_cast<uintptr_t>(data);
  // The page that the last bytes share with what comes next is joined when that is written.
  const uintptr_t begin = address & ~static_cast<uintptr_t>(kHuge - 1);
  const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) & ~static_cast<uintptr_t>(kHuge - 1);
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

}  // namespace vllm_sparse
