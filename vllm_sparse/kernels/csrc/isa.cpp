#include "isa.h"

#include <atomic>

namespace vllm_sparse {
namespace {

int detect() {
  int levels = 1 << static_cast<int>(Isa::kScalar);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    levels |= 1 << static_cast<int>(Isa::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      levels |= 1 << static_cast<int>(Isa::kAvx512);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
          __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni")) {
        levels |= 1 << static_cast<int>(Isa::kAvx512Bf16) | 1 << static_cast<int>(Isa::kAmxEmulated);
        if (request_amx()) levels |= 1 << static_cast<int>(Isa::kAmx);
      }
    }
  }
#endif
  return levels;
}

int best(int levels) {
  levels &= ~(1 << static_cast<int>(Isa::kAmxEmulated));
  int level = 0;
  while (levels >>= 1) ++level;
  return level;
}

std::atomic<int>& chosen() {
  static std::atomic<int> level{best(supported_levels())};
  return level;
}

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
    case Isa::kAmxEmulated: return kAvx512Bf16Level;
    case Isa::kAvx512: return kAvx512Level;
    case Isa::kAvx2: return kAvx2Level;
    default: return kScalarLevel;
  }
#else
  return kScalarLevel;
#endif
}

const MatrixUnit* matrix_unit() {
#if defined(__x86_64__)
  switch (static_cast<Isa>(current_level())) {
    case Isa::kAmx: return &kAmxTiles;
    case Isa::kAmxEmulated: return &kEmulatedTiles;
    default: return nullptr;
  }
#else
  return nullptr;
#endif
}

}  // namespace vllm_sparse
