#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace vllm_sparse {
namespace {

constexpr uint8_t kIllegal = 0xFF;

// Nibble i + 4*j of a 4-bit mask with bits i < j set.
struct NibbleTable {
  uint8_t of[16];
  constexpr NibbleTable() : of() {
    for (int mask = 0; mask < 16; ++mask) {
      int found[4] = {0, 0, 0, 0};
      int count = 0;
      for (int bit = 0; bit < 4; ++bit) {
        if (mask >> bit & 1) found[count++] = bit;
      }
      of[mask] = count == 2 ? static_cast<uint8_t>(found[0] + 4 * found[1]) : kIllegal;
    }
  }
};
constexpr NibbleTable kNibbles;
constexpr uint8_t kEmptyGroup = 4;  // positions 0 and 1

// Writes (or reads) one canonical value in a block.
void put_value(Kind kind, uint8_t* block, SlotPlace place, const uint8_t* value) {
  uint8_t* values = block + kMetadataBytes;
  if (is_wide(kind)) {
    std::memcpy(values + 64 * place.unit + 2 * place.word, value, 2);
  } else if (is_int4(kind)) {
    uint8_t& at = values[nibble_offset(place) / 2];
    const int shift = static_cast<int>(4 * (nibble_offset(place) % 2));
    at = static_cast<uint8_t>((at & ~(15 << shift)) | (*value & 15) << shift);
  } else {
    values[byte_offset(place)] = *value;
  }
}

void get_value(Kind kind, const uint8_t* block, SlotPlace place, uint8_t* value) {
  const uint8_t* values = block + kMetadataBytes;
  if (is_wide(kind)) {
    std::memcpy(value, values + 64 * place.unit + 2 * place.word, 2);
  } else if (is_int4(kind)) {
    const int nibble = values[nibble_offset(place) / 2] >> (4 * (nibble_offset(place) % 2)) & 15;
    *value = static_cast<uint8_t>((nibble ^ 8) - 8);
  } else {
    *value = values[byte_offset(place)];
  }
}

struct RowSource {
  const uint8_t* values;
  const uint8_t* bitmask;
};

bool pack_row(Kind kind, Shape shape, int64_t row, RowSource source, uint8_t* panel) {
  const int64_t width = canonical_bytes(kind);
  for (int64_t g = 0; g < shape.k / 4; ++g) {
    const uint8_t nibble = kNibbles.of[source.bitmask[g / 2] >> (4 * (g % 2)) & 15];
    if (nibble == kIllegal) return false;
    uint8_t* block = panel + g / 16 * block_bytes(kind);
    const SlotPlace place = slot_place(row, 2 * (g % 16));
    uint8_t& codes = block[8 * place.unit + place.word / 4];
    const int shift = static_cast<int>(2 * (place.word % 4));
    codes = static_cast<uint8_t>((codes & ~(15 << shift)) | nibble << shift);
    put_value(kind, block, place, source.values + 2 * g * width);
    put_value(kind, block, {place.unit, place.word + 1}, source.values + (2 * g + 1) * width);
  }
  return true;
}

// Zero values at positions 0 and 1 of every group, so that padding is a valid weight.
void clear_panel(Kind kind, Shape shape, uint8_t* panel) {
  const int64_t bytes = block_bytes(kind);
  std::memset(panel, 0, shape.blocks() * bytes);
  for (int64_t b = 0; b < shape.blocks(); ++b) {
    std::memset(panel + b * bytes, kEmptyGroup | kEmptyGroup << 4, kMetadataBytes);
  }
}

}  // namespace

bool pack(Kind kind, Shape shape, const uint8_t* values, const uint8_t* bitmask, uint8_t* packed) {
  const int64_t panel_bytes = shape.blocks() * block_bytes(kind);
  const int64_t value_row = shape.k / 2 * canonical_bytes(kind);
  const int64_t mask_row = ceil_div(shape.k, 8);
  std::atomic<bool> good{true};
  for_ranges(shape.panels(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = packed + p * panel_bytes;
      clear_panel(kind, shape, panel);
      for (int64_t r = 0; r < kPanelRows && p * kPanelRows + r < shape.n; ++r) {
        const int64_t row = p * kPanelRows + r;
        if (!pack_row(kind, shape, r, {values + row * value_row, bitmask + row * mask_row}, panel)) {
          good.store(false, std::memory_order_relaxed);
          return;
        }
      }
    }
  });
  return good.load();
}

void pack_dense(Shape shape, const uint8_t* dense, uint8_t* packed) {
  constexpr int64_t kBytes = block_bytes(Kind::kDense);
  const int64_t row_bytes = 2 * shape.k;
  for_ranges(shape.panels(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = packed + p * shape.blocks() * kBytes;
      std::memset(panel, 0, shape.blocks() * kBytes);
      for (int64_t r = 0; r < kPanelRows && p * kPanelRows + r < shape.n; ++r) {
        const uint8_t* row = dense + (p * kPanelRows + r) * row_bytes;
        for (int64_t at = 0; at < row_bytes; at += kLine) {
          std::memcpy(panel + at * kPanelRows + r * kLine, row + at, std::min(kLine, row_bytes - at));
        }
      }
    }
  });
}

void pack_dense_int8(Shape shape, const uint8_t* dense, uint8_t* packed) {
  constexpr int64_t kBytes = block_bytes(Kind::kDenseInt8);
  constexpr int64_t kOctet = 8;
  for_ranges(shape.panels(), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* panel = packed + p * shape.blocks() * kBytes;
      std::memset(panel, 0, shape.blocks() * kBytes);
      for (int64_t r = 0; r < kPanelRows && p * kPanelRows + r < shape.n; ++r) {
        const uint8_t* row = dense + (p * kPanelRows + r) * shape.k;
        for (int64_t at = 0; at < shape.k; at += kOctet) {
          const int64_t octet = at % kBlockColumns / kOctet;
          uint8_t* line = panel + at / kBlockColumns * kBytes + r * kLine;
          std::memcpy(line + 16 * (octet % 4) + 8 * (octet / 4), row + at, std::min(kOctet, shape.k - at));
        }
      }
    }
  });
}

void unpack(Kind kind, Shape shape, const uint8_t* packed, uint8_t* dense) {
  const int64_t width = canonical_bytes(kind);
  const int64_t panel_bytes = shape.blocks() * block_bytes(kind);
  for_ranges(shape.n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* out = dense + row * shape.k * width;
      std::memset(out, 0, shape.k * width);
      const uint8_t* panel = packed + row / kPanelRows * panel_bytes;
      for (int64_t slot = 0; slot < shape.k / 2; ++slot) {
        const uint8_t* block = panel + slot / 32 * block_bytes(kind);
        const SlotPlace place = slot_place(row % kPanelRows, slot % 32);
        const int code = block[8 * place.unit + place.word / 4] >> (2 * (place.word % 4)) & 3;
        get_value(kind, block, place, out + (slot / 2 * 4 + code) * width);
      }
    }
  });
}

}  // namespace vllm_sparse
