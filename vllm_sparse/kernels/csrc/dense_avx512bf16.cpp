// The dense baseline: the same panels and streams as the 2:4 kernel, with every weight stored.
#include <immintrin.h>

#include "baseline.h"

namespace vllm_sparse {
namespace {

template <int kT, int kRows>
void panel(const uint16_t* weight, int64_t k, const uint16_t* x, __m512 (&sum)[kRows][kT], int first) {
  for (auto& row : sum) {
    for (auto& s : row) s = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < k / 32; ++c) {
    __m512bh xs[kT];
    for (int t = 0; t < kT; ++t) {
      xs[t] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + t * k + c * 32));
    }
    for (int r = 0; r < kRows; ++r) {
      const auto w = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight + (c * 8 + first + r) * 32));
      for (int t = 0; t < kT; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w, xs[t]);
    }
  }
}

template <int kT>
void run(const DensePanels& args) {
  constexpr int kRows = kT < 4 ? 8 : 4;
  for (int64_t p = args.begin; p < args.end; ++p) {
    for (int first = 0; first < 8; first += kRows) {
      __m512 sum[kRows][kT];
      panel<kT, kRows>(args.weight + p * 8 * args.k, args.k, args.x, sum, first);
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kT; ++t) {
          const __m128 total = _mm_set_ss(_mm512_reduce_add_ps(sum[r][t]));
          const auto rounded = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(total));
          args.y[t * args.ldy + p * 8 + first + r] = static_cast<uint16_t>(_mm_extract_epi16(rounded, 0));
        }
      }
    }
  }
}

}  // namespace

void dense_panels_avx512bf16(const DensePanels& args) {
  switch (args.tokens) {
    case 1: return run<1>(args);
    case 2: return run<2>(args);
    case 3: return run<3>(args);
    default: return run<4>(args);
  }
}

}  // namespace vllm_sparse
