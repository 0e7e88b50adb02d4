// The packed layout of a 2:4 weight and the words used for it.
//
// A group is 4 consecutive columns of one row; it owns two slots, the kept values at in-group positions i < j.
// Its nibble is i + 4*j. A block is 8 rows x 64 columns: first one 64-byte line of metadata (8 qwords), then
// 8 units of 32 values. Unit u = 2p + h covers rows 2p and 2p+1 and the 32 columns 32h..32h+31. Inside a unit
// octet L (8 values) covers columns 8L..8L+7 of that half: values 8L..8L+3 are row 2p's four slots, 8L+4..8L+7
// are row 2p+1's. The 2-bit position of value w is in bits 2w, 2w+1 of metadata qword u. So each octet selects
// its activations from 8 columns, which for 16-bit values is one 128-bit lane of every x86 vector extension.
//
// How values are stored:
//   bf16, fp16  64 bytes per unit
//   int8, fp8   units 2p and 2p+1 share a 64-byte line of octets, even ones from unit 2p and odd ones from 2p+1:
//               interleaving the line with another byte by byte gives both units as 16-bit values, and one
//               16-byte broadcast brings both metadata qwords where the line's octets need them
//   int4        16 bytes per unit: values 4j..4j+3 (j = 0..7) are nibbles 4 (j/2).. of qword j mod 2, low nibbles
//               first, so that a shift per element brings each from a broadcast of the 16 bytes
//
//   dense bf16  every weight: 8 rows x 32 columns, then the block's other 32 columns; no metadata. For what a
//               checkpoint leaves dense
//   dense int8  every weight, without metadata: a 64-byte line per row, in which bytes 16L..16L+7 are columns
//               8L..8L+7 and 16L+8..16L+15 are columns 32+8L..32+8L+7, so that interleaving the line with another
//               byte by byte gives either half in order
//
// Blocks run along K inside an 8-row panel, panels follow each other. N is padded to 8, K to 64, with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vllm_sparse {

constexpr int64_t kPanelRows = 8;
constexpr int64_t kBlockColumns = 64;
constexpr int64_t kChunk = 32;  // columns that one unit covers
constexpr int64_t kUnits = 8;
constexpr int64_t kMetadataBytes = 64;
constexpr int64_t kLine = 64;

// What the values of a packed weight are; the numbers are part of the operators' signatures.
// A8: with int8 activations.
enum class Kind : int64_t {
  kBf16 = 0, kFp16 = 1, kInt8 = 2, kFp8 = 3, kInt4 = 4, kInt8A8 = 5, kInt4A8 = 6, kDense = 7, kDenseInt8 = 8
};
constexpr int64_t kKinds = 7;  // that are 2:4

// 16-bit values multiply as they are; the others are decoded to 16 bits first, unless activations are int8.
constexpr bool is_wide(Kind kind) { return kind == Kind::kBf16 || kind == Kind::kFp16; }
constexpr bool is_decoded(Kind kind) {
  return kind == Kind::kInt8 || kind == Kind::kFp8 || kind == Kind::kInt4;
}

constexpr bool is_int4(Kind kind) { return kind == Kind::kInt4 || kind == Kind::kInt4A8; }
constexpr bool has_int8_activations(Kind kind) { return kind == Kind::kInt8A8 || kind == Kind::kInt4A8; }

constexpr bool is_dense(Kind kind) { return kind == Kind::kDense || kind == Kind::kDenseInt8; }

constexpr int64_t unit_bytes(Kind kind) {
  if (is_wide(kind)) return 64;
  return is_int4(kind) ? 16 : 32;
}

constexpr int64_t block_bytes(Kind kind) {
  if (is_dense(kind)) return kPanelRows * kBlockColumns * (kind == Kind::kDense ? 2 : 1);
  return kMetadataBytes + kUnits * unit_bytes(kind);
}
constexpr int64_t kWideBlockBytes = block_bytes(Kind::kBf16);

// Bytes of a value in the canonical form (int4 has a byte of its own there).
constexpr int64_t canonical_bytes(Kind kind) { return is_wide(kind) ? 2 : 1; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Shape {
  int64_t n;
  int64_t k;
  int64_t panels() const { return ceil_div(n, kPanelRows); }
  int64_t blocks() const { return ceil_div(k, kBlockColumns); }
  int64_t padded_n() const { return panels() * kPanelRows; }
  int64_t padded_k() const { return blocks() * kBlockColumns; }
  int64_t packed_bytes(Kind kind) const { return panels() * blocks() * block_bytes(kind); }
};

// Where the value of (row in panel, slot in block) lives. A row has 32 slots in a block: slot 2g and 2g+1 are
// group g's.
struct SlotPlace {
  int64_t unit;
  int64_t word;
};

constexpr SlotPlace slot_place(int64_t row, int64_t slot) {
  const int64_t half = slot / 16;
  const int64_t in_half = slot % 16;
  return {2 * (row / 2) + half, 8 * (in_half / 4) + 4 * (row % 2) + in_half % 4};
}

// Bytes of the value at `place` from the first value byte of its block, for kinds of one byte per value.
constexpr int64_t byte_offset(SlotPlace place) {
  return place.unit / 2 * kLine + 8 * (2 * (place.word / 8) + place.unit % 2) + place.word % 8;
}

// The same for int4, in nibbles.
constexpr int64_t nibble_offset(SlotPlace place) {
  const int64_t quad = place.word / 4;
  return 32 * place.unit + 16 * (quad % 2) + 4 * (quad / 2) + place.word % 4;
}

// The nibble of the group that owns (row in panel, column in block), given the block's metadata.
constexpr int group_nibble(const uint8_t* metadata, int64_t row, int64_t column) {
  const SlotPlace place = slot_place(row, column / 4 * 2);
  return metadata[8 * place.unit + place.word / 4] >> (2 * (place.word % 4)) & 15;
}

}  // namespace vllm_sparse
