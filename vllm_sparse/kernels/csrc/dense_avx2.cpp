// Dense bf16 and int8 weights for processors without bf16 instructions: AVX2 + FMA, everything widened to float.
#include "avx2.h"
#include "dense.h"
#include "row_sums.h"

namespace vllm_sparse {
namespace {

constexpr int kRows = static_cast<int>(kPanelRows);
// Eight accumulators leave eight registers to the operands.
constexpr int kMostTokens = 4;

inline __m256 dot(__m256 sum, const Pair& w, const Pair& x) {
  return _mm256_fmadd_ps(w.second, x.second, _mm256_fmadd_ps(w.first, x.first, sum));
}

// bf16 to float is a move of 16 bits; even and odd columns go to two vectors.
inline Pair widen_pairs(__m256i v) {
  const __m256i odd = _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), _mm256_castsi256_ps(odd)};
}

// Sixteen columns (the `quarter`s of a block's 64) of a row or a token, in two vectors of any order that both share.
struct Bf16Weights {
  static constexpr Kind kKind = Kind::kDense;
  static Pair row(const uint8_t* block, int r, int quarter) {
    return widen_pairs(load(block + quarter / 2 * (block_bytes(kKind) / 2) + r * kLine + quarter % 2 * 32));
  }
  static Pair token(const uint8_t* x) { return widen_pairs(load(x)); }
};

struct Int8Weights {
  static constexpr Kind kKind = Kind::kDenseInt8;
  static __m256 widen(const uint8_t* octet) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(octet))); }
  static Pair row(const uint8_t* block, int r, int quarter) {
    const uint8_t* octets = block + r * kLine + quarter % 2 * 32 + quarter / 2 * 8;
    return {widen(octets), widen(octets + 16)};
  }
  static Pair token(const uint8_t* x) {
    const auto* const words = reinterpret_cast<const uint16_t*>(x);
    return {vllm_sparse::widen<false>(words), vllm_sparse::widen<false>(words + 8)};
  }
};

// Sixteen columns of kR rows times kT tokens. Whatever there is less of stays in registers.
template <class Weights, int kT, int kR>
inline void multiply(const uint8_t* block, int quarter, const uint8_t* x, __m256 (&sum)[kR][kT]) {
  if constexpr (kT <= kR) {
    Pair tokens[kT];
    for (int t = 0; t < kT; ++t) tokens[t] = Weights::token(x + t * kLine);
    for (int r = 0; r < kR; ++r) {
      const Pair row = Weights::row(block, r, quarter);
      for (int t = 0; t < kT; ++t) sum[r][t] = dot(sum[r][t], row, tokens[t]);
    }
  } else {
    Pair rows[kR];
    for (int r = 0; r < kR; ++r) rows[r] = Weights::row(block, r, quarter);
    for (int t = 0; t < kT; ++t) {
      const Pair token = Weights::token(x + t * kLine);
      for (int r = 0; r < kR; ++r) sum[r][t] = dot(sum[r][t], rows[r], token);
    }
  }
}

// A slab for kR rows (of 8) at a time and kT of its tokens, from token `from`.
template <class Weights, int kT, int kR>
void dense_tile(const Slab& slab, int from, float* acc) {
  constexpr int64_t kBytes = block_bytes(Weights::kKind);
  const int64_t chunk = kLine * slab.tokens;
  for (int first = 0; first < kRows; first += kR) {
    float* const sums = acc + (first * slab.tokens + from) * kLanes;
    __m256 sum[kR][kT];
    for (int r = 0; r < kR; ++r) {
      for (int t = 0; t < kT; ++t) {
        sum[r][t] = slab.fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + (r * slab.tokens + t) * kLanes);
      }
    }
    const uint8_t* block = slab.packed + first * kLine;
    const uint8_t* x = slab.x + from * kLine;
    for (int64_t b = 0; b < slab.blocks; ++b, block += kBytes, x += 2 * chunk) {
      if (slab.next != nullptr && from == 0) {
        prefetch_block<kRows / kR>(slab.next + b * kBytes, kBytes, first / kR);
      }
      for (int quarter = 0; quarter < 4; ++quarter) {
        multiply<Weights, kT, kR>(block, quarter, x + quarter / 2 * chunk + quarter % 2 * 32, sum);
      }
    }
    for (int r = 0; r < kR; ++r) {
      for (int t = 0; t < kT; ++t) _mm256_storeu_ps(sums + (r * slab.tokens + t) * kLanes, sum[r][t]);
    }
  }
}

template <class Weights>
void dense_slab(const Slab& slab, void* accumulators) {
  using TileFn = void (*)(const Slab&, int, float*);
  static constexpr TileFn kTiles[kMostTokens] = {
      dense_tile<Weights, 1, 8>, dense_tile<Weights, 2, 4>, dense_tile<Weights, 3, 2>, dense_tile<Weights, 4, 2>};
  for (int from = 0; from < slab.tokens; from += kMostTokens) {
    const int tokens = slab.tokens - from < kMostTokens ? slab.tokens - from : kMostTokens;
    kTiles[tokens - 1](slab, from, static_cast<float*>(accumulators));
  }
}

// Sums of 8 accumulators that lie `stride` floats apart.
inline __m256 reduce_rows(const float* acc, int64_t stride) {
  __m256 a[kRows];
  for (int r = 0; r < kRows; ++r) a[r] = _mm256_loadu_ps(acc + r * stride);
  return row_sums(a);
}

}  // namespace

void dense_slab_avx2(const Slab& slab, void* accumulators) { dense_slab<Bf16Weights>(slab, accumulators); }
void dense_int8_slab_avx2(const Slab& slab, void* accumulators) { dense_slab<Int8Weights>(slab, accumulators); }

void dense_store_avx2(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256 sum = reduce_rows(acc, int64_t{tokens} * kLanes);
    if (out.wide == nullptr) {
      store_rows<Bf16Float>(sum, out, t);
    } else {
      alignas(32) float rows[kRows];
      _mm256_store_ps(rows, scaled(sum, out));
      std::memcpy(out.wide + t * out.ldy, rows, out.rows * sizeof(float));
    }
  }
}

}  // namespace vllm_sparse
