#include "isa.h"

#include <atomic>

#include "tiles.h"
#include "token_lanes.h"

namespace vllm_sparse {
namespace {

constexpr int bit(Isa level) { return 1 << static_cast<int>(level); }

int detect() {
  int levels = bit(Isa::kScalar);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    levels |= bit(Isa::kAvx2) | bit(Isa::kAvx2Lanes);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      levels |= bit(Isa::kAvx512);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")) {
        levels |= bit(Isa::kAvx512Bf16) | bit(Isa::kAvx512Bf16Lanes);
        if (request_amx()) levels |= bit(Isa::kAmx) | bit(Isa::kAmxTiles);
      }
    }
  }
#endif
  return levels;
}

int best(int levels) {
  levels &= (1 << kFirstForTests) - 1;
  int level = 0;
  while (levels >>= 1) ++level;
  return level;
}

std::atomic<int>& chosen() {
  static std::atomic<int> level{best(supported_levels())};
  return level;
}

const KernelTable& table_of(const LinearArgs& args) { return args.half ? kernels().fp16 : kernels().bf16; }

#if defined(__x86_64__)
int64_t from_one(const ManyTokens&, Kind) { return 1; }

// Measured on Zen 3: from here on, not selecting activations in registers saves more than expanding the weights costs.
// int4 weights with int8 activations have faster loops at any number of tokens.
int64_t lanes_pay_from(const ManyTokens&, Kind kind) {
  if (kind == Kind::kInt4A8) return kNever;
  return kind == Kind::kInt8A8 ? 23 : 19;
}

void on_tiles(const LinearArgs& args) { linear_tiles(args, table_of(args), kAmxUnit); }
bool in_lanes(const LinearArgs& args) { return lanes_support(table_of(args), args); }
void on_lanes(const LinearArgs& args) { linear_lanes(args, table_of(args)); }
#endif

}  // namespace

int supported_levels() {
  static const int levels = detect();
  return levels;
}

int current_level() { return chosen().load(std::memory_order_relaxed); }

bool set_level(int level) {
  if (level < 0 || level > 30 || (supported_levels() >> level & 1) == 0) return false;
  chosen().store(level, std::memory_order_relaxed);
  return true;
}

const Level& kernels() {
#if defined(__x86_64__)
  switch (static_cast<Isa>(current_level())) {
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
    case Isa::kAmxTiles:
    case Isa::kAvx512Bf16Lanes: return kAvx512Bf16Level;
    case Isa::kAvx512: return kAvx512Level;
    case Isa::kAvx2:
    case Isa::kAvx2Lanes: return kAvx2Level;
    default: return kScalarLevel;
  }
#else
  return kScalarLevel;
#endif
}

const ManyTokens* many_tokens() {
#if defined(__x86_64__)
  static constexpr ManyTokens kAmx = {"the matrix unit", tiles_support, on_tiles, measured_once};
  static constexpr ManyTokens kAmxTiles = {"the matrix unit", tiles_support, on_tiles, from_one};
  static constexpr ManyTokens kAnyLanes = {"token lanes", in_lanes, on_lanes, from_one};
  static constexpr ManyTokens kLanes = {"token lanes", in_lanes, on_lanes, lanes_pay_from};
  static constexpr ManyTokens kMeasuredLanes = {"token lanes", in_lanes, on_lanes, measured_once};
  switch (static_cast<Isa>(current_level())) {
    case Isa::kAmx: return &kAmx;
    case Isa::kAmxTiles: return &kAmxTiles;
    case Isa::kAvx2Lanes:
    case Isa::kAvx512Bf16Lanes: return &kAnyLanes;
    case Isa::kAvx512Bf16:
    case Isa::kAvx512: return &kMeasuredLanes;
    case Isa::kAvx2: return &kLanes;
    default: return nullptr;
  }
#else
  return nullptr;
#endif
}

}  // namespace vllm_sparse
