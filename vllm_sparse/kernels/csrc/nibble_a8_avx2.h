// int4 weights with int8 activations for AVX2, multiplied without being unpacked in memory: the loops and selections of
// int8 weights, whose values come from nibbles here. At the end of a scale group the integers are scaled and added to
// float32 sums in memory, in which rows alternate as in the integers.
#pragma once

#include "avx2.h"
#include "group_runs.h"

namespace vllm_sparse {
namespace {

// A byte of a unit is a group of one row: its first slot in the low nibble, its second in the high one. Byte by byte to
// the tops of words, in the order of the octets of an int8 line: of either unit four groups, of its rows two each.
template <int kUnit, int kHalf>
constexpr auto kGroupTops = constant<uint16_t>([](int w) {
  const int group = 2 * (2 * kHalf + w / 8) + w % 2, row = w % 4 / 2;
  return w % 8 / 4 == kUnit ? 0x80 | (8 * row + group) << 8 : 0x8080;
});
// Words are 4096 times the values: nibbles stay at the top.
constexpr float kTopNibble = 1.0f / 4096;
// Blocks whose sums are sure to fit 32 bits: each adds eight products of less than 2^23 to a lane.
constexpr int64_t kMostRun = 16;

struct Int4Ops : Int8Ops {
  static constexpr Kind kKind = Kind::kInt4A8;
  static __m256i unit(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  template <int kHalf>
  static __m256i groups(const uint8_t* units) {
    return _mm256_or_si256(_mm256_shuffle_epi8(unit(units), load(kGroupTops<0, kHalf>.of)),
                           _mm256_shuffle_epi8(unit(units + unit_bytes(kKind)), load(kGroupTops<1, kHalf>.of)));
  }
  static IntPair values(const uint8_t* values, int step, int half) {
    const uint8_t* const units = values + 2 * unit_bytes(kKind) * step;
    const __m256i words = half == 0 ? groups<0>(units) : groups<1>(units);
    return {_mm256_slli_epi16(words, 4), _mm256_and_si256(words, _mm256_set1_epi16(static_cast<int16_t>(0xF000)))};
  }
};

// Of a row pair, for each lane of its sums.
inline __m256 pair_scales(const GroupRuns& runs, int pair) {
  if (runs.scales(0) == nullptr) return _mm256_set1_ps(kTopNibble);
  __m128 both = _mm_setzero_ps();
  both = _mm_loadl_pi(both, reinterpret_cast<const __m64*>(runs.scales(0) + 2 * pair));
  both = _mm_loadh_pi(both, reinterpret_cast<const __m64*>(runs.scales(1) + 2 * pair));
  return _mm256_mul_ps(_mm256_set_m128(both, both), _mm256_set1_ps(kTopNibble));
}

template <int kT, int kP>
void nibble_tile(const Slab& slab, float* acc) {
  for (int first = 0; first < kPairs; first += kP) {
    float* const sums = acc + first * kT * kLanes;
    TileRun<Int4Ops, kT, kP> tile(slab, 0, first);
    GroupRuns runs(slab);
    int64_t blocks;
    for (int64_t left = slab.blocks; left > 0; left -= blocks) {
      blocks = std::min({runs.blocks(), left, kMostRun});
      __m256i sum[kP][kT] = {};
      tile.add(blocks, blocks == left, sum);
      for (int p = 0; p < kP; ++p) {
        const __m256 scales = pair_scales(runs, first + p);
        for (int t = 0; t < kT; ++t) {
          float* const to = sums + (p * kT + t) * kLanes;
          const __m256 before = slab.fresh && left == slab.blocks ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[p][t]), scales, before));
        }
      }
      runs.advance(blocks);
    }
  }
}

inline void nibble_slab(const Slab& slab, void* accumulators) {
  using TileFn = void (*)(const Slab&, float*);
  static constexpr TileFn kTiles[kMaxInt4A8Tile] = {nibble_tile<1, 4>, nibble_tile<2, 4>, nibble_tile<3, 2>,
                                                    nibble_tile<4, 2>, nibble_tile<5, 1>, nibble_tile<6, 1>,
                                                    nibble_tile<7, 1>, nibble_tile<8, 1>};
  kTiles[slab.tokens - 1](slab, static_cast<float*>(accumulators));
}

template <class Float>
void nibble_store(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  const __m256 correction = _mm256_loadu_ps(out.correction);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256 sum = _mm256_sub_ps(reduce_a4(acc, int64_t{tokens} * kLanes), correction);
    store_rows<Float>(_mm256_mul_ps(sum, _mm256_set1_ps(out.token_scale[t])), out, t);
  }
}

}  // namespace
}  // namespace vllm_sparse
