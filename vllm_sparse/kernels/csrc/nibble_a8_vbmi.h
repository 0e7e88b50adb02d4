// int4 weights with int8 activations, multiplied as bytes without being unpacked in memory; needs AVX-512 VBMI and
// VNNI.
//
// A 64-byte line of nibbles holds four units, one to a 128-bit lane, whose qwords are the rows of the unit's pair.
// Its low nibbles are slots 0 and 2 of the rows' quads of values, its high ones slots 1 and 3. Both are taken where
// they lie, low ones shifted up: as signed bytes they are 16 times the values. So a byte of a line's two products
// belongs to the lane and row of its nibbles, both add to the same accumulator, and two accumulators hold all 8 rows.
// At the end of a scale group the integers are scaled and added to float32 sums in memory.
#pragma once

#include "byte_decoder.h"
#include "group_runs.h"

namespace vllm_sparse {
namespace {

constexpr int kNibbleLines = 2;
constexpr float kNibbleStep = 1.0f / 16;

// Byte b: unit (of four) b / 16, row (b / 8) mod 2, octet (b / 2) mod 4, and b mod 2 the pair of slots.
constexpr auto kNibbleCode = constant<uint8_t>([](int b) { return 16 * (b % 8 / 2) + 8 * (b / 8 % 2) + 4 * (b % 2); });
constexpr auto kNibbleFirst = constant<uint8_t>([](int b) {
  return 8 * (2 * (b % 8 / 2) + b / 16 % 2) + 4 * (b % 2);
});
// A unit's metadata to both of its qwords.
constexpr auto kLineUnits = constant<uint64_t>([](int q) { return q / 2; });
// Scales of the first half's group, then of the second's, to the dwords of either line's accumulator.
constexpr int scale_place(int line, int d) { return 8 * (d / 4 % 2) + 2 * (2 * line + d / 8) + d % 4 / 2; }
constexpr auto kLineScales0 = constant<uint32_t>([](int d) { return scale_place(0, d); });
constexpr auto kLineScales1 = constant<uint32_t>([](int d) { return scale_place(1, d); });

// The two products of one line.
struct NibbleLine {
  __m512i low_select, high_select;  // activations, from the 64 bytes of a block
  __m512i low, high;                // 16 * values
};

class NibbleReader {
 public:
  NibbleLine operator()(const uint8_t* block, int line) const {
    const __m256i metadata = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32 * line));
    const __m512i codes = _mm512_permutexvar_epi64(units_, _mm512_castsi256_si512(metadata));
    const __m512i bytes = load(block + kMetadataBytes + kLine * line);
    return {decode_codes(codes, low_control_, mask_, first_), decode_codes(codes, high_control_, mask_, first_),
            _mm512_and_si512(_mm512_slli_epi16(bytes, 4), top_), _mm512_and_si512(bytes, top_)};
  }

 private:
  const __m512i low_control_ = load(kNibbleCode.of);
  const __m512i high_control_ = _mm512_add_epi8(low_control_, _mm512_set1_epi8(2));
  const __m512i mask_ = _mm512_set1_epi8(3);
  const __m512i first_ = load(kNibbleFirst.of);
  const __m512i top_ = _mm512_set1_epi8(static_cast<char>(0xF0));
  const __m512i units_ = load(kLineUnits.of);
};

inline __m512 line_scales(const GroupRuns& runs, int line) {
  if (runs.scales(0) == nullptr) return _mm512_set1_ps(1.0f);
  const __m512 first = _mm512_castps256_ps512(_mm256_loadu_ps(runs.scales(0)));
  const __m512 both = _mm512_insertf32x8(first, _mm256_loadu_ps(runs.scales(1)), 1);
  return _mm512_permutexvar_ps(load(line == 0 ? kLineScales0.of : kLineScales1.of), both);
}

// One pass over a slab for kT tokens. Up to 8 of them the accumulators, a block's eight operands and what makes them
// have room in 32 registers; half the rows for more tokens at a time was slower.
template <int kT>
void nibble_tile(const Slab& slab, float* acc) {
  constexpr int64_t kBytes = block_bytes(Kind::kInt4A8);
  const NibbleReader read;
  GroupRuns runs(slab);
  const uint8_t* block = slab.packed;
  const uint8_t* next = slab.next;
  const uint8_t* x = slab.x;
  if (slab.fresh) std::memset(acc, 0, sizeof(float) * kNibbleLines * kT * kLanes);
  for (int64_t left = slab.blocks; left > 0;) {
    const int64_t run = std::min(runs.blocks(), left);
    __m512i sum[kNibbleLines][kT];
    for (int l = 0; l < kNibbleLines; ++l) {
      for (int t = 0; t < kT; ++t) sum[l][t] = _mm512_setzero_si512();
    }
    int64_t i = run;
    do {  // at least one block: the sums stay in registers
      if (next != nullptr) {
        prefetch_block<1>(next, kBytes, 0);
        next += kBytes;
      }
      NibbleLine lines[kNibbleLines];
      for (int l = 0; l < kNibbleLines; ++l) lines[l] = read(block, l);
      for (int t = 0; t < kT; ++t) {
        __m512i columns = load(x + kLine * t);
        keep_here(columns);  // one load; the compiler would make it one for each use
        for (int l = 0; l < kNibbleLines; ++l) {
          const __m512i low = _mm512_permutexvar_epi8(lines[l].low_select, columns);
          const __m512i high = _mm512_permutexvar_epi8(lines[l].high_select, columns);
          sum[l][t] = _mm512_dpbusd_epi32(sum[l][t], low, lines[l].low);
          sum[l][t] = _mm512_dpbusd_epi32(sum[l][t], high, lines[l].high);
        }
      }
      block += kBytes;
      x += kLine * kT;
    } while (--i > 0);
    for (int l = 0; l < kNibbleLines; ++l) {
      const __m512 scale = line_scales(runs, l);
      for (int t = 0; t < kT; ++t) {
        float* to = acc + (l * kT + t) * kLanes;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[l][t]), scale, _mm512_loadu_ps(to)));
      }
    }
    // Leaves the float sums in memory where the others need the registers.
    if (kT > 2) asm volatile("" : : : "memory");
    runs.advance(run);
    left -= run;
  }
}

inline void slab_a4(const Slab& slab, void* accumulators) {
  using TileFn = void (*)(const Slab&, float*);
  static constexpr TileFn kTiles[kMaxInt4A8Tile] = {nibble_tile<1>, nibble_tile<2>, nibble_tile<3>, nibble_tile<4>,
                                                    nibble_tile<5>, nibble_tile<6>, nibble_tile<7>, nibble_tile<8>};
  kTiles[slab.tokens - 1](slab, static_cast<float*>(accumulators));
}

// Rows 0..7 of one token from both lines' sums.
inline __m256 reduce_a4(const float* acc, int64_t line_stride) {
  const __m512 a = _mm512_loadu_ps(acc);
  const __m512 b = _mm512_loadu_ps(acc + line_stride);
  // Lane u: the rows of unit u, then those of unit 4 + u.
  const __m512 units = _mm512_add_ps(_mm512_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                                     _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  const __m512 pairs = _mm512_add_ps(_mm512_shuffle_f32x4(units, units, _MM_SHUFFLE(2, 0, 2, 0)),
                                     _mm512_shuffle_f32x4(units, units, _MM_SHUFFLE(3, 1, 3, 1)));
  return _mm256_permutevar8x32_ps(_mm512_castps512_ps256(pairs), _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7));
}

template <class Float>
void store_a4(const void* accumulators, int tokens, const Epilogue& out) {
  const float* acc = static_cast<const float*>(accumulators);
  const __m256 correction = _mm256_loadu_ps(out.correction);
  for (int t = 0; t < tokens; ++t, acc += kLanes) {
    const __m256 rows = reduce_a4(acc, int64_t{tokens} * kLanes);
    const __m256 sum = _mm256_fmsub_ps(rows, _mm256_set1_ps(kNibbleStep), correction);
    store_rows<Float>(_mm256_mul_ps(sum, _mm256_set1_ps(out.token_scale[t])), out, t);
  }
}

}  // namespace
}  // namespace vllm_sparse
