// int4 weights with int8 activations for AVX2, multiplied as bytes without being unpacked in memory: a pair of products
// of an activation (at most 255) and a weight (at most 8) fits 16 bits, and so do eight sums of them.
//
// A vector's lanes are the halves of a block, its words groups of a row pair; even groups of octets have one vector,
// odd ones another. So 16 columns of activations lie in each lane (`arrange_groups`), one byte shuffle selects them for
// both slots of a group, and words of the same row are neighbours. At the end of a scale group the integers are scaled
// and added to float32 sums in memory, in which rows alternate.
#pragma once

#include "avx2.h"
#include "group_runs.h"

namespace vllm_sparse {
namespace {

// Which octet and row the words of a lane belong to.
constexpr int word_octet(int w) { return w / 4 % 2 * 2 + w % 2; }
constexpr int word_row(int w) { return w / 2 % 2; }

// From the metadata of a row pair, in both lanes: byte by byte to words, each half's to its lane.
constexpr auto kWordMetadata = constant<uint16_t>([](int w) {
  return 0x8000 | (8 * (w / 8) + 2 * word_octet(w) + word_row(w));
});
constexpr auto kWordColumns = constant<uint16_t>([](int w) { return 0x0101 * 4 * word_octet(w); });
// From a unit, whose bytes are groups of one row and then of the other: even groups, then odd ones.
constexpr auto kEvenOdd = constant<uint8_t>([](int b) { return 8 * word_row(b) + 2 * word_octet(b) + b % 16 / 8; });
constexpr auto kSigned = constant<int8_t>([](int b) { return b % 16 < 8 ? b % 16 : b % 16 - 16; });

// What multiplies the activations of even and of odd groups, and what selects those.
struct PairOperands {
  __m256i even_columns, odd_columns, even, odd;
};

class PairReader {
 public:
  PairOperands operator()(const uint8_t* block, int pair) const {
    const __m128i metadata = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block) + pair);
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(metadata), metadata_);
    // A code to the bottom of each byte, of the even groups; those of the odd ones are four bits above.
    const __m256i codes = _mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 6));
    const __m256i units = load(block + kMetadataBytes + 2 * unit_bytes(Kind::kInt4A8) * pair);
    const __m256i groups = _mm256_shuffle_epi8(units, even_odd_);
    const __m256i first = _mm256_shuffle_epi8(signed_, _mm256_and_si256(groups, fifteen_));
    const __m256i second = _mm256_shuffle_epi8(signed_, _mm256_and_si256(_mm256_srli_epi16(groups, 4), fifteen_));
    return {columns(codes), columns(_mm256_srli_epi16(codes, 4)), _mm256_unpacklo_epi8(first, second),
            _mm256_unpackhi_epi8(first, second)};
  }

 private:
  __m256i columns(__m256i codes) const { return _mm256_or_si256(_mm256_and_si256(codes, three_), first_); }

  const __m256i metadata_ = load(kWordMetadata.of), first_ = load(kWordColumns.of);
  const __m256i even_odd_ = load(kEvenOdd.of), signed_ = load(kSigned.of);
  const __m256i three_ = _mm256_set1_epi8(3), fifteen_ = _mm256_set1_epi8(15);
};

// 64 columns in order: the even groups of either half, then the odd ones.
inline void arrange_groups(const uint8_t* bytes, uint8_t* chunk) {
  for (int64_t g = 0; g < kBlockColumns / 4; ++g) std::memcpy(chunk + 32 * (g % 2) + 4 * (g / 2), bytes + 4 * g, 4);
}

// Of a row pair, for each lane of its sums.
inline __m256 pair_scales(const GroupRuns& runs, int pair) {
  if (runs.scales(0) == nullptr) return _mm256_set1_ps(1.0f);
  const auto rows = [&](int half) {
    return _mm_castpd_ps(_mm_loaddup_pd(reinterpret_cast<const double*>(runs.scales(half) + 2 * pair)));
  };
  return _mm256_set_m128(rows(1), rows(0));
}

// Blocks whose sums are sure to fit 16 bits: each adds two words to a lane.
constexpr int64_t kMostRun = 4;

// A run of blocks, of whose halves each has one scale group.
struct Run {
  const uint8_t* block;
  const uint8_t* next;  // to prefetch meanwhile, or null
  int64_t blocks;
  const uint8_t* x;
  bool fresh;
};

// kT tokens times kP row pairs, from `first` on.
template <int kT, int kP>
inline void multiply_run(const Run& run, const PairReader& read, const GroupRuns& groups, int first, float* acc) {
  constexpr int64_t kBytes = block_bytes(Kind::kInt4A8);
  const uint8_t* block = run.block;
  const uint8_t* next = run.next;
  const uint8_t* x = run.x;
  __m256i sum[kP][kT] = {};
  int64_t left = run.blocks;
  do {
    if (next != nullptr) {
      prefetch_block<kPairs / kP>(next, kBytes, first / kP);
      next += kBytes;
    }
#pragma GCC unroll 4
    for (int p = 0; p < kP; ++p) {
      const PairOperands w = read(block, first + p);
#pragma GCC unroll 8
      for (int t = 0; t < kT; ++t) {
        const __m256i even = _mm256_shuffle_epi8(load(x + kLine * t), w.even_columns);
        sum[p][t] = _mm256_add_epi16(sum[p][t], _mm256_maddubs_epi16(even, w.even));
        const __m256i odd = _mm256_shuffle_epi8(load(x + kLine * t + 32), w.odd_columns);
        sum[p][t] = _mm256_add_epi16(sum[p][t], _mm256_maddubs_epi16(odd, w.odd));
        in_order(sum[p][t]);
      }
    }
    block += kBytes;
    x += kLine * kT;
  } while (--left > 0);
#pragma GCC unroll 4
  for (int p = 0; p < kP; ++p) {
    const __m256 scales = pair_scales(groups, first + p);
#pragma GCC unroll 8
    for (int t = 0; t < kT; ++t) {
      float* const to = acc + ((first + p) * kT + t) * kLanes;
      const __m256 of_rows = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[p][t], _mm256_set1_epi16(1)));
      const __m256 before = run.fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
      _mm256_storeu_ps(to, _mm256_fmadd_ps(of_rows, scales, before));
    }
  }
}

template <int kT, int kP>
void nibble_tile(const Slab& slab, float* acc) {
  constexpr int64_t kBytes = block_bytes(Kind::kInt4A8);
  const PairReader read;
  GroupRuns groups(slab);
  Run run{slab.packed, slab.next, 0, slab.x, slab.fresh};
  for (int64_t left = slab.blocks; left > 0; left -= run.blocks) {
    run.blocks = std::min({groups.blocks(), left, kMostRun});
    for (int first = 0; first < kPairs; first += kP) multiply_run<kT, kP>(run, read, groups, first, acc);
    groups.advance(run.blocks);
    run.block += run.blocks * kBytes;
    run.x += run.blocks * kLine * kT;
    if (run.next != nullptr) run.next += run.blocks * kBytes;
    run.fresh = false;
  }
}

inline void nibble_slab(const Slab& slab, void* accumulators) {
  using TileFn = void (*)(const Slab&, float*);
  static constexpr TileFn kTiles[kMaxInt4A8Tile] = {nibble_tile<1, 4>, nibble_tile<2, 1>, nibble_tile<3, 1>,
                                                    nibble_tile<4, 1>, nibble_tile<5, 1>, nibble_tile<6, 1>,
                                                    nibble_tile<7, 1>, nibble_tile<8, 1>};
  kTiles[slab.tokens - 1](slab, static_cast<float*>(accumulators));
}

template <class Float>
void nibble_store(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  const __m256 correction = _mm256_loadu_ps(out.correction);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256 sum = _mm256_sub_ps(reduce(acc, int64_t{tokens} * kLanes), correction);
    store_rows<Float>(_mm256_mul_ps(sum, _mm256_set1_ps(out.token_scale[t])), out, t);
  }
}

}  // namespace
}  // namespace vllm_sparse
