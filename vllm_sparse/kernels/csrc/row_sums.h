// The last step of a dense product, for every level with 256-bit vectors.
#pragma once

#include <immintrin.h>

namespace vllm_sparse {
namespace {

// The sum of each of 8 rows' accumulators, in the rows' order.
inline __m256 row_sums(const __m256 (&a)[8]) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

}  // namespace
}  // namespace vllm_sparse
