// The library's C interface: no torch, no C++ types, so that one build serves every torch and Python.
#include "launch.cuh"

#define SPARSE24_EXPORT extern "C" __attribute__((visibility("default")))

SPARSE24_EXPORT int sparse24_abi_version() { return kAbiVersion; }

static int launch_wgmma(const Problem& problem, const Launch& launch, void* stream) {
  if (launch.warps % 4 || problem.stages < 3 || problem.stages > 6) return sparse24::kUnsupported;
  switch (static_cast<Format>(launch.format)) {
    case Format::kSixteenBits:
      return sparse24::launch_wgmma_sixteen_bits(problem, launch, stream);
    case Format::kInt8:
      return sparse24::launch_wgmma_int8(problem, launch, stream);
    case Format::kFp8:
      return sparse24::launch_wgmma_fp8(problem, launch, stream);
    case Format::kInt4:
      return sparse24::launch_wgmma_int4(problem, launch, stream);
  }
  return sparse24::kUnsupported;
}

// 0, a CUDA error, or -1: no such instance. The launch is queued on `stream`; nothing waits.
SPARSE24_EXPORT int sparse24_mma_sp(const Problem* problem, const Launch* launch, void* stream) {
  if (launch->warps < 1 || launch->warps > 8) return sparse24::kUnsupported;
  if (launch->warpgroups) return launch_wgmma(*problem, *launch, stream);
  if (problem->stages < 2 || problem->stages > 4) return sparse24::kUnsupported;
  switch (static_cast<Format>(launch->format)) {
    case Format::kSixteenBits:
      return sparse24::launch_sixteen_bits(*problem, *launch, stream);
    case Format::kInt8:
      return sparse24::launch_int8(*problem, *launch, stream);
    case Format::kFp8:
      return sparse24::launch_fp8(*problem, *launch, stream);
    case Format::kInt4:
      return sparse24::launch_int4(*problem, *launch, stream);
  }
  return sparse24::kUnsupported;
}

#ifdef SPARSE24_EMULATE
// The tensors that the emulated kernel may touch, and when asynchronous copies land.
SPARSE24_EXPORT void sparse24_emulate(const machine::Range* ranges, int count, int eager) {
  machine::emulator.ranges.assign(ranges, ranges + count);
  machine::emulator.eager = eager;
  machine::emulator.error.clear();
}
SPARSE24_EXPORT const char* sparse24_error(int code) {
  return code == sparse24::kUnsupported ? "no such instance" : machine::emulator.error.c_str();
}
#else
SPARSE24_EXPORT const char* sparse24_error(int code) {
  return code == sparse24::kUnsupported ? "no such instance"
                                        : cudaGetErrorString(static_cast<cudaError_t>(code));
}
#endif
