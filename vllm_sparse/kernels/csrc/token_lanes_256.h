// Token lanes of 256 bits, for levels from AVX2 on. Loads bound them: a core loads two vectors a cycle and adds two
// products; every product of eight tokens takes one load, and up to six share another that broadcasts the weight.
#pragma once

#include "token_lanes.h"

#include "avx2.h"
#include "nibble_a8.h"

namespace vllm_sparse {
namespace {

// ---- Sums and products ---------------------------------------------------------------------------------------

struct FloatSums {
  using Acc = __m256;
  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc read(const float* p) { return _mm256_loadu_ps(p); }
  static void write(float* p, Acc sum) { _mm256_storeu_ps(p, sum); }
};

// Columns of floats.
struct Floats : FloatSums {
  static constexpr int64_t kColumns = 64;
  static constexpr int64_t kEntries = 32;
  static constexpr int kMostSums = 12;
  static __m256 broadcast(const uint8_t* value) {
    return _mm256_broadcast_ss(reinterpret_cast<const float*>(value));
  }
  static __m256 add(__m256 sum, __m256 weight, const uint8_t* column) {
    return _mm256_fmadd_ps(weight, _mm256_loadu_ps(reinterpret_cast<const float*>(column)), sum);
  }
};

// Columns of pairs: for a group's kept columns i < j, the activations of both as words. All six pairs of a group are
// there, and a group's two weights are one entry.
constexpr int64_t kPairsOfGroup = 6;
struct Pairs {
  static constexpr int64_t kColumns = kBlockColumns / 4 * kPairsOfGroup;
  static constexpr int64_t kEntries = 16;
  static __m256i broadcast(const uint8_t* value) { return _mm256_castps_si256(Floats::broadcast(value)); }
};

// bf16. Dot: two products of words, added to the floats of `sum`.
template <class Dot>
struct Bf16Pairs : Pairs, FloatSums {
  static constexpr int kMostSums = Dot::kMostSums;
  static __m256 add(__m256 sum, __m256i weights, const uint8_t* column) {
    return Dot::add(sum, weights, load(column));
  }
};

// Integers. Dot: two products of words, added to the dwords of `sum`.
template <class Dot>
struct Integers : Pairs {
  using Acc = __m256i;
  static constexpr int kMostSums = Dot::kMostSums;
  static Acc zero() { return _mm256_setzero_si256(); }
  static Acc read(const float* p) { return load(p); }
  static void write(float* p, Acc sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sum); }
  static Acc add(Acc sum, __m256i weights, const uint8_t* column) { return Dot::add(sum, weights, load(column)); }
};

// The lines that the next rows will read, while these are multiplied: the processor's own look-ahead is too late for so
// few.
inline void prefetch(const void* p, int64_t bytes) {
#pragma GCC unroll 8
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(static_cast<const char*>(p) + at, 0, 3);
}

// kRows rows of a panel from `row` on, times kPlanes planes. kScaled: sums are integers, scaled and added as floats.
// Without the pragmas GCC keeps the sums in memory.
template <class Numbers, bool kScaled, int kPlanes, int kRows>
inline void multiply_rows(const LaneProduct& p, int64_t row) {
  constexpr int64_t kEntries = Numbers::kEntries;
  constexpr int64_t kEntryBytes = row_bytes(kEntries);
  constexpr int64_t kStride = plane_bytes(Numbers::kColumns);
  float* const sums = static_cast<float*>(p.sums) + row * kPlanes * kPlaneTokens;
  const uint8_t* const entries = p.entries + row * kEntryBytes;
  const auto place = [&](int r, int v) { return sums + (r * kPlanes + v) * kPlaneTokens; };
  prefetch(entries + kRows * kEntryBytes, kRows * kEntryBytes);
  prefetch(place(kRows, 0), kRows * kPlanes * kColumnBytes);
  typename Numbers::Acc sum[kRows][kPlanes];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPlanes; ++v) sum[r][v] = kScaled || p.fresh ? Numbers::zero() : Numbers::read(place(r, v));
  }
#pragma GCC unroll 1
  for (int64_t e = 0; e < kEntries; ++e) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* const of_row = entries + r * kEntryBytes;
      uint16_t offset;
      std::memcpy(&offset, of_row + kEntries * 4 + e * 2, sizeof(offset));
      const uint8_t* const column = p.columns + offset;
      const auto weight = Numbers::broadcast(of_row + e * 4);
#pragma GCC unroll 8
      for (int v = 0; v < kPlanes; ++v) sum[r][v] = Numbers::add(sum[r][v], weight, column + v * kStride);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kPlanes; ++v) {
      if constexpr (kScaled) {
        const __m256 scale = _mm256_set1_ps(p.scales == nullptr ? 1.0f : p.scales[row + r]);
        const __m256 before = p.fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(place(r, v));
        _mm256_storeu_ps(place(r, v), _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][v]), scale, before));
      } else {
        Numbers::write(place(r, v), sum[r][v]);
      }
    }
  }
}

// Rows that are multiplied side by side: 8, 4, 2 or 1, for as many sums as there are registers.
template <class Numbers>
constexpr int rows_of(int planes) {
  int rows = kPanelRows;
  while (rows > 1 && rows * planes > Numbers::kMostSums) rows /= 2;
  return rows;
}

template <class Numbers, bool kScaled, int kPlanes>
void multiply_panel(const LaneProduct& p) {
  constexpr int kRows = rows_of<Numbers>(kPlanes);
  for (int64_t row = 0; row < kPanelRows; row += kRows) multiply_rows<Numbers, kScaled, kPlanes, kRows>(p, row);
}

template <class Numbers, bool kScaled>
void multiply(const LaneProduct& p) {
  using PanelFn = void (*)(const LaneProduct&);
  static constexpr PanelFn kPanels[kMostPlanes] = {
      multiply_panel<Numbers, kScaled, 1>, multiply_panel<Numbers, kScaled, 2>, multiply_panel<Numbers, kScaled, 3>,
      multiply_panel<Numbers, kScaled, 4>, multiply_panel<Numbers, kScaled, 5>, multiply_panel<Numbers, kScaled, 6>,
  };
  kPanels[p.planes - 1](p);
}

// ---- Weights to entries --------------------------------------------------------------------------------------

// Where the columns of a group start, for the words of half a unit.
constexpr auto kHalfUnitColumns =
    constant<uint16_t>([](int w) { return (w / 8 * 8 + w % 4 / 2 * 4) * kColumnBytes; });

// AVX2 has no variable 16-bit shift: a multiplication moves a code to the top of its word, a shift brings it down.
constexpr auto kWordSpread = constant<uint16_t>([](int w) { return 2 * (w / 8) | (2 * (w / 8) + 1) << 8; });
constexpr auto kWordLift = constant<uint16_t>([](int w) { return 1 << (14 - 2 * (w % 8)); });

struct WordCodes {
  const __m256i spread = load(kWordSpread.of), lift = load(kWordLift.of);
  // The codes of half a unit, a word each.
  __m256i codes(const uint8_t* metadata) const {
    const __m256i words = _mm256_shuffle_epi8(metadata_word(metadata), spread);
    return _mm256_srli_epi16(_mm256_mullo_epi16(words, lift), 14);
  }
};

struct ColumnSelector : WordCodes {
  const __m256i base = load(kHalfUnitColumns.of);
  // For half a unit whose columns start with column `first` of the block.
  __m256i select(const uint8_t* metadata, int first) const {
    const __m256i in_group = _mm256_mullo_epi16(codes(metadata), _mm256_set1_epi16(kColumnBytes));
    const __m256i start = _mm256_add_epi16(base, _mm256_set1_epi16(static_cast<int16_t>(first * kColumnBytes)));
    return _mm256_add_epi16(in_group, start);
  }
};

// Quads of two rows in turn, to one row in each lane.
inline __m256i rows_apart(__m256i v) { return _mm256_permute4x64_epi64(v, 0xD8); }
inline void store128(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
inline void store_lanes(uint8_t* first, uint8_t* second, __m256i v) {
  store128(first, _mm256_castsi256_si128(v));
  store128(second, _mm256_extracti128_si256(v, 1));
}

struct WidenBf16 {
  static __m256 floats(__m128i words) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  }
};
struct WidenFp16 {
  static __m256 floats(__m128i words) { return _mm256_cvtph_ps(words); }
};

template <class Widen>
void expand_wide(const uint8_t* block, uint8_t* entries) {
  const ColumnSelector selector;
  constexpr int64_t kRow = row_bytes(Floats::kEntries);
  for (int unit = 0; unit < kUnits; ++unit) {
    for (int half = 0; half < 2; ++half) {
      uint8_t* const first = entries + unit / 2 * 2 * kRow;
      uint8_t* const second = first + kRow;
      const int at = unit % 2 * 16 + half * 8;
      const __m256i words = rows_apart(load(block + kMetadataBytes + kLine * unit + 32 * half));
      _mm256_storeu_ps(reinterpret_cast<float*>(first) + at, Widen::floats(_mm256_castsi256_si128(words)));
      _mm256_storeu_ps(reinterpret_cast<float*>(second) + at, Widen::floats(_mm256_extracti128_si256(words, 1)));
      const __m256i columns = selector.select(block + 8 * unit + 4 * half, unit % 2 * 32 + half * 16);
      const int64_t offset = Floats::kEntries * 4 + at * 2;
      store_lanes(first + offset, second + offset, rows_apart(columns));
    }
  }
}

// Where the pair (i, j) of a group lies among its columns.
constexpr int pair_place(int i, int j) { return i == 0 ? j - 1 : i + j; }

struct PairSelector {
  // By a group's nibble i + 4j.
  const __m128i places = _mm_setr_epi8(0, 0, 0, 0, place(0, 1), 0, 0, 0, place(0, 2), place(1, 2), 0, 0, place(0, 3),
                                       place(1, 3), place(2, 3), 0);
  static constexpr char place(int i, int j) { return static_cast<char>(pair_place(i, j) * kColumnBytes); }

  // The groups of both rows in one half of the columns: nibbles in order, rows in turn.
  __m128i in_group(__m128i metadata, bool upper) const {
    const __m128i fifteen = _mm_set1_epi8(15);
    const __m128i low = _mm_and_si128(metadata, fifteen);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(metadata, 4), fifteen);
    return _mm_shuffle_epi8(places, upper ? _mm_unpackhi_epi8(low, high) : _mm_unpacklo_epi8(low, high));
  }
  // For a pair of rows, the columns of 16 entries each: four for each octet, two of them from either half.
  void select(const uint8_t* metadata, uint8_t* first, uint8_t* second) const {
    const __m128i line = _mm_loadu_si128(reinterpret_cast<const __m128i*>(metadata));
    const __m128i lower = in_group(line, false), upper = in_group(line, true);
    const __m128i front = _mm_shuffle_epi32(_mm_unpacklo_epi16(lower, upper), _MM_SHUFFLE(3, 1, 2, 0));
    const __m128i back = _mm_shuffle_epi32(_mm_unpackhi_epi16(lower, upper), _MM_SHUFFLE(3, 1, 2, 0));
    store_columns(first, _mm_unpacklo_epi64(front, back));
    store_columns(second, _mm_unpackhi_epi64(front, back));
  }

 private:
  static void store_columns(uint8_t* p, __m128i in_group) {
    static constexpr auto kStarts = constant<uint16_t>([](int e) {
      const int group = e % 4 / 2 * 8 + e / 4 * 2 + e % 2;
      return group * kPairsOfGroup * kColumnBytes;
    });
    const __m256i columns = _mm256_add_epi16(_mm256_cvtepu8_epi16(in_group), load(kStarts.of));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), columns);
  }
};

inline void expand_bytes(const uint8_t* block, uint8_t* entries) {
  const PairSelector selector;
  constexpr int64_t kRow = row_bytes(Pairs::kEntries);
  for (int pair = 0; pair < kPairs; ++pair) {
    const uint8_t* const line = block + kMetadataBytes + kLine * pair;
    uint8_t* const first = entries + 2 * pair * kRow;
    uint8_t* const second = first + kRow;
    for (int octet = 0; octet < 4; ++octet) {
      const auto* const bytes = reinterpret_cast<const __m128i*>(line) + octet;
      const __m256i words = rows_apart(_mm256_cvtepi8_epi16(_mm_loadu_si128(bytes)));
      store_lanes(first + 16 * octet, second + 16 * octet, words);
    }
    constexpr int64_t kOffsets = Pairs::kEntries * 4;
    selector.select(block + 16 * pair, first + kOffsets, second + kOffsets);
  }
}

inline void expand_nibbles(const uint8_t* block, uint8_t* entries) {
  alignas(64) uint8_t bytes[block_bytes(Kind::kInt8A8)];
  unpack_block(block, bytes);
  expand_bytes(bytes, entries);
}

inline void store64(uint8_t* low, uint8_t* high, __m128i v) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(low), v);
  _mm_storeh_pd(reinterpret_cast<double*>(high), _mm_castsi128_pd(v));
}

// bf16 as pairs.
inline void expand_words(const uint8_t* block, uint8_t* entries) {
  const PairSelector selector;
  constexpr int64_t kRow = row_bytes(Pairs::kEntries);
  for (int pair = 0; pair < kPairs; ++pair) {
    uint8_t* const first = entries + 2 * pair * kRow;
    uint8_t* const second = first + kRow;
    for (int half = 0; half < 2; ++half) {
      for (int octets = 0; octets < 2; ++octets) {
        const __m256i words = load(block + kMetadataBytes + kLine * (2 * pair + half) + 32 * octets);
        const int64_t at = 32 * octets + 8 * half;
        store64(first + at, second + at, _mm256_castsi256_si128(words));
        store64(first + at + 16, second + at + 16, _mm256_extracti128_si256(words, 1));
      }
    }
    constexpr int64_t kOffsets = Pairs::kEntries * 4;
    selector.select(block + 16 * pair, first + kOffsets, second + kOffsets);
  }
}

// ---- Activations to columns ----------------------------------------------------------------------------------

inline void transpose(__m256 (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  // Lane l of r[i + c] then holds column 4l + c of rows i .. i + 3.
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
  for (int c = 0; c < 4; ++c) {
    t[c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
    t[4 + c] = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// Eight columns of 16 bits of `tokens` rows that lie a line apart.
template <class Widen>
void widen_columns(const uint8_t* rows, int tokens, uint8_t* target) {
  __m256 r[kPlaneTokens];
  for (int t = 0; t < kPlaneTokens; ++t) {
    r[t] = _mm256_setzero_ps();
    if (t < tokens) r[t] = Widen::floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + t * kLine)));
  }
  transpose(r);
  for (int c = 0; c < 8; ++c) _mm256_storeu_ps(reinterpret_cast<float*>(target + c * kColumnBytes), r[c]);
}

template <class Widen>
void float_columns(const uint8_t* rows, int tokens, int64_t blocks, uint8_t* target, int64_t stride) {
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* const to = target + b * stride;
    for (int64_t c = 0; c < kBlockColumns; c += 8) {
      const uint8_t* const chunk = rows + (2 * b + c / kChunk) * tokens * kLine;
      widen_columns<Widen>(chunk + c % kChunk * 2, tokens, to + c * kColumnBytes);
    }
  }
}

// Bytes i and j of each dword, to the tops of its words.
template <int kI, int kJ>
constexpr auto kPairTops = constant<int8_t>([](int b) {
  const int dword = b % 16 / 4 * 4;
  return b % 2 == 0 ? -128 : dword + (b % 4 == 1 ? kI : kJ);
});

template <int kI, int kJ>
inline void store_pair(__m256i group, uint8_t* target) {
  const __m256i words = _mm256_srai_epi16(_mm256_shuffle_epi8(group, load(kPairTops<kI, kJ>.of)), 8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + pair_place(kI, kJ) * kColumnBytes), words);
}

// The six pairs of a group; dwords hold its activations as unsigned bytes of zero point 128.
inline void store_pairs(__m256i group, uint8_t* target) {
  const __m256i signed_bytes = _mm256_xor_si256(group, _mm256_set1_epi8(static_cast<char>(0x80)));
  store_pair<0, 1>(signed_bytes, target);
  store_pair<0, 2>(signed_bytes, target);
  store_pair<0, 3>(signed_bytes, target);
  store_pair<1, 2>(signed_bytes, target);
  store_pair<1, 3>(signed_bytes, target);
  store_pair<2, 3>(signed_bytes, target);
}

inline void byte_columns(const uint8_t* rows, int tokens, int64_t blocks, uint8_t* target, int64_t stride) {
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* const to = target + b * stride;
    for (int half = 0; half < 2; ++half) {
      __m256 r[kPlaneTokens];
      for (int t = 0; t < kPlaneTokens; ++t) {
        const uint8_t* const row = rows + (b * tokens + t) * kLine + 32 * half;
        r[t] = t < tokens ? _mm256_castsi256_ps(load(row)) : _mm256_setzero_ps();
      }
      transpose(r);
      for (int d = 0; d < 8; ++d) {
        const int octet = 4 * half + d / 2;
        const int group = octet % 2 * 8 + octet / 2 * 2 + d % 2;
        store_pairs(_mm256_castps_si256(r[d]), to + group * kPairsOfGroup * kColumnBytes);
      }
    }
  }
}

// The six pairs of a group whose first and last two words are the dwords of `first` and `second`.
inline void store_word_pairs(__m256i first, __m256i second, uint8_t* target) {
  // The word that becomes the lower one of a pair, and the one that becomes the upper.
  const __m256i low[] = {first, _mm256_srli_epi32(first, 16), second};
  const __m256i high[] = {_mm256_setzero_si256(), first, _mm256_slli_epi32(second, 16), second};
  const auto put = [&](int i, int j) {
    auto* const to = reinterpret_cast<__m256i*>(target + pair_place(i, j) * kColumnBytes);
    _mm256_storeu_si256(to, _mm256_blend_epi16(low[i], high[j], 0xAA));
  };
  put(0, 1);
  put(0, 2);
  put(0, 3);
  put(1, 2);
  put(1, 3);
  put(2, 3);
}

inline void word_columns(const uint8_t* rows, int tokens, int64_t blocks, uint8_t* target, int64_t stride) {
  constexpr int kGroups = 4;  // in 32 bytes of a row
  for (int64_t b = 0; b < blocks; ++b) {
    uint8_t* const to = target + b * stride;
    for (int64_t part = 0; part < kBlockColumns / 16; ++part) {
      __m256 r[kPlaneTokens];
      for (int t = 0; t < kPlaneTokens; ++t) {
        const uint8_t* const row = rows + ((2 * b + part / 2) * tokens + t) * kLine + part % 2 * 32;
        r[t] = t < tokens ? _mm256_castsi256_ps(load(row)) : _mm256_setzero_ps();
      }
      transpose(r);
      for (int64_t g = 0; g < kGroups; ++g) {
        store_word_pairs(_mm256_castps_si256(r[2 * g]), _mm256_castps_si256(r[2 * g + 1]),
                         to + (part * kGroups + g) * kPairsOfGroup * kColumnBytes);
      }
    }
  }
}

// ---- Sums to outputs -----------------------------------------------------------------------------------------

template <class Float, bool kIntegers>
void store_plane(const void* sums, int64_t stride, int tokens, const Epilogue& out) {
  __m256 r[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) {
    const float* const row = static_cast<const float*>(sums) + i * stride;
    r[i] = kIntegers ? _mm256_cvtepi32_ps(load(row)) : _mm256_loadu_ps(row);
  }
  transpose(r);
  for (int t = 0; t < tokens; ++t) {
    __m256 sum = r[t];
    if (out.token_scale != nullptr) sum = _mm256_mul_ps(sum, _mm256_set1_ps(out.token_scale[t]));
    store_rows<Float>(sum, out, t);
  }
}

// ---- Tables --------------------------------------------------------------------------------------------------

template <class Float, class Widen>
constexpr TokenLanes kFloatLanes = {Floats::kColumns,    Floats::kEntries,        float_columns<Widen>,
                                    expand_wide<Widen>, multiply<Floats, false>, store_plane<Float, false>};
template <class Dot>
constexpr TokenLanes kBf16Lanes = {Pairs::kColumns, Pairs::kEntries,                  word_columns,
                                   expand_words,    multiply<Bf16Pairs<Dot>, false>, store_plane<Bf16Float, false>};
template <class Float, class Dot>
constexpr TokenLanes kByteLanes = {Pairs::kColumns, Pairs::kEntries,                 byte_columns,
                                   expand_bytes,    multiply<Integers<Dot>, false>, store_plane<Float, true>};
template <class Float, class Dot>
constexpr TokenLanes kNibbleLanes = {Pairs::kColumns, Pairs::kEntries,                byte_columns,
                                     expand_nibbles,  multiply<Integers<Dot>, true>, store_plane<Float, false>};

}  // namespace
}  // namespace vllm_sparse
