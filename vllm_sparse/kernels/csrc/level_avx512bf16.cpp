// AVX-512 with BF16, VBMI and VNNI: Zen 4, Sapphire Rapids and later.
#include "avx512.h"
#include "byte_decoder.h"
#include "dense.h"
#include "token_lanes.h"
#include "nibble_a8_vbmi.h"

namespace vllm_sparse {
namespace {

constexpr auto kWordShift = constant<uint16_t>([](int w) { return 2 * w; });

struct Selector {
  const __m512i control = load(kWordShift.of);
  const __m512i mask = _mm512_set1_epi16(3);
  const __m512i first = load(kFirstColumn.of);
  __m512i select(const uint8_t* metadata) const {
    int64_t codes;
    std::memcpy(&codes, metadata, sizeof(codes));
    return decode_codes(_mm512_set1_epi64(codes), control, mask, first);
  }
};

struct Bf16Ops : FloatAcc, Selector {
  static constexpr Kind kKind = Kind::kBf16;
  using Values = __m512i;
  static __m512i values(const uint8_t* p) { return load(p); }
  static __m512i widen(__m512i v) { return v; }
  static __m512 dot(__m512 sum, __m512i v, __m512i x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(v), reinterpret_cast<__m512bh>(x));
  }
};

// Byte b of a line is value 8 (b / 16) + b mod 8 of the unit of parity (b / 8) mod 2.
constexpr auto kByteShift = constant<uint8_t>([](int b) { return 2 * (8 * (b / 16) + b % 8); });
constexpr auto kFirstByte = constant<uint8_t>([](int b) { return 8 * (b / 8) + 4 * ((b % 4) / 2); });

struct Int8Ops : IntAcc {
  using Values = __m512i;
  const __m512i control = load(kByteShift.of);
  const __m512i mask = _mm512_set1_epi8(3);
  const __m512i first = load(kFirstByte.of);
  __m512i select(const uint8_t* metadata) const {
    return decode_codes(_mm512_broadcast_i64x2(load128(metadata)), control, mask, first);
  }
  static __m512i values(const uint8_t* p) { return load(p); }
  static __m512i permute(__m512i select, const uint8_t* x) { return _mm512_permutexvar_epi8(select, load(x)); }
  static __m512i dot(__m512i sum, __m512i v, __m512i x) { return _mm512_dpbusd_epi32(sum, x, v); }
};

struct Bf16Float {
  static constexpr bool kWide = false;
  static __m128i round(__m256 v) { return reinterpret_cast<__m128i>(_mm256_cvtneps_pbh(v)); }
  static __m256i round(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
};

// ---- Quantised values in registers ---------------------------------------------------------------------------

// int4: an index into 16 values for the pair's first row and 16 for its second.
constexpr auto kNibbleShift = constant<uint16_t>([](int w) { return 16 * (w / 8) + 4 * (w % 4); });
constexpr auto kSecondRow = constant<uint16_t>([](int w) { return w % 8 < 4 ? 0 : 16; });
constexpr auto kNibbleValue = constant<float>([](int i) { return i < 8 ? i : i - 16; });

template <class Float>
struct NibbleDecoder {
  const __m512i control = load(kNibbleShift.of);
  const __m512i mask = _mm512_set1_epi16(15);
  const __m512i second_row = load(kSecondRow.of);
  const __m512 value = _mm512_loadu_ps(kNibbleValue.of);
  __m512i tables[2][kPairs];  // of either half's group; the second is used where the halves' groups differ
  const __m512i* half_tables[2];

  void set_scales(int half, const float* scales) {
    for (int p = 0; p < kPairs; ++p) {
      const __m256i first = Float::round(_mm512_mul_ps(value, _mm512_set1_ps(scales[2 * p])));
      const __m256i second = Float::round(_mm512_mul_ps(value, _mm512_set1_ps(scales[2 * p + 1])));
      tables[half][p] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
    half_tables[half] = tables[half];
    if (half == 0) half_tables[1] = tables[0];
  }
  void promote_second() {
    for (int p = 0; p < kPairs; ++p) tables[0][p] = tables[1][p];
    half_tables[1] = tables[0];
  }
  __m512i unit(const uint8_t* values, __m512i table) const {
    const __m512i codes = _mm512_broadcast_i64x2(load128(values));
    return _mm512_permutexvar_epi16(decode_codes(codes, control, mask, second_row), table);
  }
  UnitPair operator()(const uint8_t* values, int pair) const {
    return {unit(values + 32 * pair, half_tables[0][pair]), unit(values + 32 * pair + 16, half_tables[1][pair])};
  }
};

// Walks the scale groups of a panel in steps of half a block, without dividing.
class GroupWalk {
 public:
  explicit GroupWalk(const Decode& d) : d_(d), column_(d.first * kBlockColumns) {
    if (d.scales == nullptr) return;
    group_ = column_ / d.group;
    boundary_ = (group_ + 1) * d.group;
    fresh_ = true;
  }
  // The 8 scales of the next half block, or null if they are the same as before.
  const float* next() {
    if (d_.scales == nullptr) return nullptr;
    if (column_ == boundary_) {
      ++group_;
      boundary_ += d_.group;
      fresh_ = true;
    }
    column_ += kChunk;
    if (!fresh_) return nullptr;
    fresh_ = false;
    return d_.scales + group_ * kPanelRows;
  }

 private:
  const Decode& d_;
  int64_t column_;
  int64_t group_ = 0;
  int64_t boundary_ = 0;
  bool fresh_ = false;
};

// Calls `use(block index, pair, the pair's two units)` for all blocks.
template <Kind kKind, class Decoder, class Use>
inline void for_pairs(const Decode& d, const Use& use) {
  constexpr int64_t kBytes = block_bytes(kKind);
  static constexpr float kOnes[kPanelRows] = {1, 1, 1, 1, 1, 1, 1, 1};
  Decoder decoder;
  GroupWalk groups(d);
  if constexpr (kKind == Kind::kInt4) decoder.set_scales(0, kOnes);
  const uint8_t* block = d.packed;
  for (int64_t b = 0; b < d.blocks; ++b, block += kBytes) {
    if (d.next != nullptr) prefetch_block<1>(d.next + b * kBytes, kBytes, 0);
    if constexpr (kKind == Kind::kInt4) {
      // A group that starts in the second half becomes the first half's in the next block.
      if (decoder.half_tables[1] == decoder.tables[1]) decoder.promote_second();
      for (int h = 0; h < 2; ++h) {
        if (const float* scales = groups.next()) decoder.set_scales(h, scales);
      }
    }
    for (int p = 0; p < kPairs; ++p) use(b, p, decoder(block + kMetadataBytes, p));
  }
}

template <Kind kKind, class Decoder>
void decode_to(const Decode& d) {
  for (int64_t b = 0; b < d.blocks; ++b) {
    std::memcpy(d.out + b * kWideBlockBytes, d.packed + b * block_bytes(kKind), kMetadataBytes);
  }
  for_pairs<kKind, Decoder>(d, [&](int64_t b, int p, const UnitPair& units) {
    uint8_t* out = d.out + b * kWideBlockBytes + kMetadataBytes + 2 * kLine * p;
    _mm512_storeu_si512(out, units.first);
    _mm512_storeu_si512(out + kLine, units.second);
  });
}

template <class Ops, Kind kKind, class Decoder>
void multiply_one(const Decode& d, const uint8_t* x, bool fresh, float* acc) {
  const Ops ops;
  __m512 sum[kPairs][2];
  for (int p = 0; p < kPairs; ++p) {
    sum[p][0] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + p * kLanes);
    sum[p][1] = _mm512_setzero_ps();
  }
  for_pairs<kKind, Decoder>(d, [&](int64_t b, int p, const UnitPair& units) {
    const uint8_t* metadata = d.packed + b * block_bytes(kKind) + 16 * p;
    const uint8_t* chunk = x + 2 * kLine * b;
    sum[p][0] = ops.dot(sum[p][0], ops.widen(units.first), ops.permute(ops.select(metadata), chunk));
    sum[p][1] = ops.dot(sum[p][1], ops.widen(units.second), ops.permute(ops.select(metadata + 8), chunk + kLine));
  });
  for (int p = 0; p < kPairs; ++p) _mm512_storeu_ps(acc + p * kLanes, _mm512_add_ps(sum[p][0], sum[p][1]));
}

template <class Float, bool Half>
void decode_fast(const Decode& d) {
  if (d.kind == Kind::kInt4) return decode_to<Kind::kInt4, NibbleDecoder<Float>>(d);
  if (d.scales != nullptr) return decode<Lanes<Float>>(d);
  if (d.kind == Kind::kInt8) return decode_to<Kind::kInt8, ByteDecoder<Half, Kind::kInt8>>(d);
  return decode_to<Kind::kFp8, ByteDecoder<Half, Kind::kFp8>>(d);
}

template <class Ops, class Float, bool Half>
void direct(const Decode& d, const uint8_t* x, int, bool fresh, void* accumulators) {
  float* acc = static_cast<float*>(accumulators);
  if (d.kind == Kind::kInt4) return multiply_one<Ops, Kind::kInt4, NibbleDecoder<Float>>(d, x, fresh, acc);
  if (d.kind == Kind::kInt8) {
    return multiply_one<Ops, Kind::kInt8, ByteDecoder<Half, Kind::kInt8>>(d, x, fresh, acc);
  }
  return multiply_one<Ops, Kind::kFp8, ByteDecoder<Half, Kind::kFp8>>(d, x, fresh, acc);
}

// Several tokens share a decoded slab.
int direct_tokens(Kind kind, bool scaled) { return scaled && kind != Kind::kInt4 ? 0 : 1; }

using HalfOps = Fp16Ops<Selector>;

}  // namespace

const Level kAvx512Bf16Level = {
    {.slab = slab<Bf16Ops>, .store = store<Bf16Float>, .gather = gather<false>,
     .decode = decode_fast<Bf16Float, false>, .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Bf16Float>,
     .quantize = quantize<false>, .slab_a4 = slab_a4, .store_a4 = store_a4<Bf16Float>, .quantize_a4 = quantize<false>,
     .direct = direct<Bf16Ops, Bf16Float, false>, .direct_tokens = direct_tokens, .slab_dense = dense_slab_avx512bf16,
     .slab_dense_int8 = dense_int8_slab_avx512bf16, .store_dense = dense_store_avx512bf16, .lanes = &kLanesAvx512Bf16},
    {.slab = slab<HalfOps>, .store = store<Fp16Float>, .gather = gather<true>, .decode = decode_fast<Fp16Float, true>,
     .slab_a8 = slab<Int8Ops>, .store_a8 = store_a8<Fp16Float>, .quantize = quantize<true>, .slab_a4 = slab_a4,
     .store_a4 = store_a4<Fp16Float>, .quantize_a4 = quantize<true>, .direct = direct<HalfOps, Fp16Float, true>,
     .direct_tokens = direct_tokens, .lanes = &kLanesAvx512Bf16Fp16},
};

}  // namespace vllm_sparse
