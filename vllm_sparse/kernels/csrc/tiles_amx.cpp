// Intel AMX: Sapphire Rapids and later.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

namespace vllm_sparse {
namespace {

// From arch/x86/include/uapi/asm/prctl.h; the tile registers' state component is 18.
constexpr long kRequestPermission = 0x1023;
constexpr long kTileData = 18;

// Intel's SDM, "Tile Configuration": palette 1, then bytes per row and rows of eight registers.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void enter() {
  Configuration configuration;
  for (int i = 0; i < 8; ++i) {
    configuration.row_bytes[i] = kLine;
    configuration.rows[i] = kTileRows;
  }
  _tile_loadconfig(&configuration);
}

void leave() { _tile_release(); }

// The intrinsics want literal numbers of registers.
#define VLLM_SPARSE_TILE_DOT(sums, weights, tokens) \
  do {                                              \
    if constexpr (kInt8) {                          \
      _tile_dpbsud(sums, weights, tokens);          \
    } else {                                        \
      _tile_dpbf16ps(sums, weights, tokens);        \
    }                                               \
  } while (false)

// Registers: 0 to 3 sums, 4 and 5 weights, 6 and 7 tokens.
template <bool kInt8, bool kTwo>
void run(const TileProduct& p) {
  if (p.fresh) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) _tile_zero(2);
    if constexpr (kTwo) _tile_zero(3);
  } else {
    _tile_loadd(0, p.sums[0][0], kLine);
    _tile_loadd(1, p.sums[1][0], kLine);
    if constexpr (kTwo) _tile_loadd(2, p.sums[0][1], kLine);
    if constexpr (kTwo) _tile_loadd(3, p.sums[1][1], kLine);
  }
  for (int64_t at = 0; at < p.steps * kStepBytes; at += kStepBytes) {
    _tile_loadd(4, p.weights[0] + at, kLine);
    _tile_loadd(6, p.tokens[0] + at, kLine);
    VLLM_SPARSE_TILE_DOT(0, 4, 6);
    _tile_loadd(5, p.weights[1] + at, kLine);
    VLLM_SPARSE_TILE_DOT(1, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, p.tokens[1] + at, kLine);
      VLLM_SPARSE_TILE_DOT(2, 4, 7);
      VLLM_SPARSE_TILE_DOT(3, 5, 7);
    }
  }
  _tile_stored(0, p.sums[0][0], kLine);
  _tile_stored(1, p.sums[1][0], kLine);
  if constexpr (kTwo) _tile_stored(2, p.sums[0][1], kLine);
  if constexpr (kTwo) _tile_stored(3, p.sums[1][1], kLine);
}
#undef VLLM_SPARSE_TILE_DOT

template <bool kInt8>
void multiply(const TileProduct& product) {
  product.tokens[1] == nullptr ? run<kInt8, false>(product) : run<kInt8, true>(product);
}

}  // namespace

const MatrixUnit kAmxUnit = {enter, leave, multiply<false>, multiply<true>};

bool request_amx() {
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace vllm_sparse
