// Intel AMX (tiles, bf16, int8) in plain C++; included by immintrin.h, after which it hides the intrinsics as that does.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

// Macros in GCC's header.
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud

namespace vllm_sparse {
namespace emulated {

[[noreturn]] inline void tile_fault(const char* what) {
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

struct TileRegister {
  int rows = 0, row_bytes = 0;
  uint8_t data[16][64] = {};

  template <class T>
  T& at(int row, int element) {
    return *reinterpret_cast<T*>(data[row] + element * sizeof(T));
  }
};

// A thread's registers; without a configuration every use is an exception (#UD).
struct TileUnit {
  bool configured = false;
  TileRegister registers[8];

  TileRegister& operator[](int index) {
    if (!configured) tile_fault("used without a configuration");
    if (index < 0 || index > 7) tile_fault("no such register");
    return registers[index];
  }
};

inline thread_local TileUnit tile_unit;

// Shapes that a product needs: (rows x depth) times (depth x columns of dwords).
inline void check_product(const TileRegister& sums, const TileRegister& a, const TileRegister& b) {
  if (sums.rows != a.rows || a.row_bytes / 4 != b.rows || sums.row_bytes != b.row_bytes) {
    tile_fault("a product of shapes that do not fit");
  }
}

}  // namespace emulated

// Palette 1: bytes per row at 16, 18, ..., rows at 48, 49, ...
inline void _tile_loadconfig(const void* configuration) {
  const uint8_t* bytes = static_cast<const uint8_t*>(configuration);
  if (bytes[0] != 1) emulated::tile_fault("a configuration of another palette than 1");
  for (int i = 0; i < 8; ++i) {
    emulated::TileRegister& tile = emulated::tile_unit.registers[i];
    tile = {};
    tile.row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tile.rows = bytes[48 + i];
    if (tile.rows > 16 || tile.row_bytes > 64) emulated::tile_fault("a configuration of too large a register");
  }
  emulated::tile_unit.configured = true;
}

inline void _tile_release() { emulated::tile_unit = {}; }

inline void _tile_zero(int to) {
  emulated::TileRegister& tile = emulated::tile_unit[to];
  std::memset(tile.data, 0, sizeof(tile.data));
}

inline void _tile_loadd(int to, const void* from, int64_t stride) {
  emulated::TileRegister& tile = emulated::tile_unit[to];
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(tile.data[r], static_cast<const char*>(from) + r * stride, static_cast<size_t>(tile.row_bytes));
  }
}

inline void _tile_stored(int from, void* to, int64_t stride) {
  const emulated::TileRegister& tile = emulated::tile_unit[from];
  for (int r = 0; r < tile.rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tile.data[r], static_cast<size_t>(tile.row_bytes));
  }
}

// TDPBF16PS: even and odd elements are summed apart, from zero, and then both added.
inline void _tile_dpbf16ps(int to, int first, int second) {
  using emulated::flushed, emulated::of_bf16;
  emulated::TileRegister &sums = emulated::tile_unit[to], &a = emulated::tile_unit[first];
  emulated::TileRegister& b = emulated::tile_unit[second];
  emulated::check_product(sums, a, b);
  const int columns = sums.row_bytes / 4;
  for (int m = 0; m < sums.rows; ++m) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < b.rows; ++k) {
      const float x = of_bf16(a.at<uint16_t>(m, 2 * k)), y = of_bf16(a.at<uint16_t>(m, 2 * k + 1));
      const uint16_t* row = &b.at<uint16_t>(k, 0);
      for (int n = 0; n < columns; ++n) even[n] = flushed(std::fma(x, of_bf16(row[2 * n]), even[n]));
      for (int n = 0; n < columns; ++n) odd[n] = flushed(std::fma(y, of_bf16(row[2 * n + 1]), odd[n]));
    }
    for (int n = 0; n < columns; ++n) {
      float& sum = sums.at<float>(m, n);
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
    }
  }
}

// TDPBSUD: signed bytes of the first times unsigned ones of the second.
inline void _tile_dpbsud(int to, int first, int second) {
  emulated::TileRegister &sums = emulated::tile_unit[to], &a = emulated::tile_unit[first];
  emulated::TileRegister& b = emulated::tile_unit[second];
  emulated::check_product(sums, a, b);
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      uint32_t sum = sums.at<uint32_t>(m, n);
      for (int k = 0; k < b.rows; ++k) {
        for (int i = 0; i < 4; ++i) {
          sum += static_cast<uint32_t>(a.at<int8_t>(m, 4 * k + i) * b.at<uint8_t>(k, 4 * n + i));
        }
      }
      sums.at<uint32_t>(m, n) = sum;
    }
  }
}

// The system's leave to use the registers.
inline long syscall(long, long, long) { return 0; }

}  // namespace vllm_sparse
