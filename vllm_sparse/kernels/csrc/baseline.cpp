#include "baseline.h"

#include <atomic>
#include <cstring>

#include "parallel.h"

namespace vllm_sparse {

uint64_t read_all(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kStep = 128;
  std::atomic<uint64_t> total{0};
  for_ranges(bytes / kStep, [&](int64_t begin, int64_t end) {
    uint64_t sums[16] = {};
    for (int64_t i = begin; i < end; ++i) {
      uint64_t words[16];
      std::memcpy(words, data + i * kStep, kStep);
      for (int j = 0; j < 16; ++j) sums[j] ^= words[j];
    }
    uint64_t sum = 0;
    for (const uint64_t s : sums) sum ^= s;
    total.fetch_xor(sum);
  });
  return total.load();
}

}  // namespace vllm_sparse
