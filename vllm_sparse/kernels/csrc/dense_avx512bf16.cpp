// Dense bf16 and int8 weights in the same panels, blocking and streams as the 2:4 kernels, with every weight
// stored.
#include "dense.h"

#include "avx512.h"
#include "byte_decoder.h"
#include "row_sums.h"

namespace vllm_sparse {
namespace {

constexpr int kRows = static_cast<int>(kPanelRows);

inline __m512 dot(__m512 sum, __m512i w, __m512i x) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}

// 32 columns: kR rows at `w` times kT tokens at `x`. Whatever there is less of stays in registers.
template <int kT, int kR>
inline void multiply(const uint8_t* w, const uint8_t* x, __m512 (&sum)[kR][kT]) {
  if constexpr (kT <= kR) {
    __m512i xs[kT];
    for (int t = 0; t < kT; ++t) xs[t] = load(x + t * kLine);
    for (int r = 0; r < kR; ++r) {
      const __m512i row = load(w + r * kLine);
      for (int t = 0; t < kT; ++t) sum[r][t] = dot(sum[r][t], row, xs[t]);
    }
  } else {
    __m512i rows[kR];
    for (int r = 0; r < kR; ++r) rows[r] = load(w + r * kLine);
    for (int t = 0; t < kT; ++t) {
      const __m512i token = load(x + t * kLine);
      for (int r = 0; r < kR; ++r) sum[r][t] = dot(sum[r][t], rows[r], token);
    }
  }
}

// Both halves of a block of bf16.
struct Bf16Weights {
  static constexpr Kind kKind = Kind::kDense;
  template <int kT, int kR>
  void block(const uint8_t* w, const uint8_t* x, __m512 (&sum)[kR][kT]) const {
    multiply<kT, kR>(w, x, sum);
    multiply<kT, kR>(w + block_bytes(kKind) / 2, x + kT * kLine, sum);
  }
};

// A block of int8: a row's line becomes both of its halves.
struct Int8Weights {
  static constexpr Kind kKind = Kind::kDenseInt8;
  const ByteDecoder<false, Kind::kInt8> decoder;
  template <int kT, int kR>
  void block(const uint8_t* w, const uint8_t* x, __m512 (&sum)[kR][kT]) const {
    for (int r = 0; r < kR; ++r) {
      const UnitPair row = decoder(w, r);
      for (int t = 0; t < kT; ++t) sum[r][t] = dot(sum[r][t], row.first, load(x + t * kLine));
      for (int t = 0; t < kT; ++t) sum[r][t] = dot(sum[r][t], row.second, load(x + (kT + t) * kLine));
    }
  }
};

// A slab for kR rows (of 8) at a time and kT tokens, accumulators in registers.
template <class Weights, int kT, int kR>
void dense_tile(const Slab& slab, void* accumulators) {
  constexpr int64_t kBytes = block_bytes(Weights::kKind);
  const Weights weights;
  float* const acc = static_cast<float*>(accumulators);
  for (int first = 0; first < kRows; first += kR) {
    __m512 sum[kR][kT];
    for (int r = 0; r < kR; ++r) {
      for (int t = 0; t < kT; ++t) {
        sum[r][t] = slab.fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + ((first + r) * kT + t) * kLanes);
      }
    }
    const uint8_t* block = slab.packed + first * kLine;
    const uint8_t* next = slab.next;
    const uint8_t* x = slab.x;
    for (int64_t b = 0; b < slab.blocks; ++b, block += kBytes, x += 2 * kT * kLine) {
      if (next != nullptr) {
        prefetch_block<kRows / kR>(next, kBytes, first / kR);
        next += kBytes;
      }
      weights.template block<kT, kR>(block, x, sum);
    }
    for (int r = 0; r < kR; ++r) {
      for (int t = 0; t < kT; ++t) _mm512_storeu_ps(acc + ((first + r) * kT + t) * kLanes, sum[r][t]);
    }
  }
}

// Sums of 8 accumulators that lie `stride` floats apart.
inline __m256 reduce_rows(const float* acc, int64_t stride) {
  __m256 a[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = _mm256_add_ps(_mm256_loadu_ps(acc + r * stride), _mm256_loadu_ps(acc + r * stride + 8));
  }
  return row_sums(a);
}

struct Bf16Float {
  static __m128i round(__m256 v) { return reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)); }
};

}  // namespace

void dense_slab_avx512bf16(const Slab& slab, void* accumulators) {
  static constexpr SlabFn kTiles[kMaxDenseTile] = {
      dense_tile<Bf16Weights, 1, 8>, dense_tile<Bf16Weights, 2, 8>, dense_tile<Bf16Weights, 3, 8>,
      dense_tile<Bf16Weights, 4, 4>, dense_tile<Bf16Weights, 5, 4>, dense_tile<Bf16Weights, 6, 4>,
      dense_tile<Bf16Weights, 7, 2>, dense_tile<Bf16Weights, 8, 2>, dense_tile<Bf16Weights, 9, 2>,
      dense_tile<Bf16Weights, 10, 2>, dense_tile<Bf16Weights, 11, 2>, dense_tile<Bf16Weights, 12, 2>,
      dense_tile<Bf16Weights, 13, 2>, dense_tile<Bf16Weights, 14, 2>,
  };
  kTiles[slab.tokens - 1](slab, accumulators);
}

void dense_int8_slab_avx512bf16(const Slab& slab, void* accumulators) {
  static constexpr SlabFn kTiles[kMaxDenseInt8Tile] = {
      dense_tile<Int8Weights, 1, 8>, dense_tile<Int8Weights, 2, 8>, dense_tile<Int8Weights, 3, 4>,
      dense_tile<Int8Weights, 4, 4>, dense_tile<Int8Weights, 5, 4>, dense_tile<Int8Weights, 6, 2>,
      dense_tile<Int8Weights, 7, 2>, dense_tile<Int8Weights, 8, 2>, dense_tile<Int8Weights, 9, 2>,
      dense_tile<Int8Weights, 10, 2>,
  };
  kTiles[slab.tokens - 1](slab, accumulators);
}

void dense_store_avx512bf16(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256 sum = reduce_rows(acc, int64_t{tokens} * kLanes);
    if (out.wide == nullptr) {
      store_rows<Bf16Float>(sum, out, t);
    } else {
      _mm256_mask_storeu_ps(out.wide + t * out.ldy, row_mask(out), scaled(sum, out));
    }
  }
}

}  // namespace vllm_sparse
