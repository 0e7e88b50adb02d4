// The library's C interface: no torch, no C++ types, so that one build serves every torch and Python.
#include "launch.cuh"

#define SPARSE24_EXPORT extern "C" __attribute__((visibility("default")))

SPARSE24_EXPORT int sparse24_abi_version() { return kAbiVersion; }

using Instances = int (*)(const Problem&, const Launch&, void*);

// The instances of one kernel, and how many stages it takes.
struct Kernel {
  Instances sixteen_bits, int8, fp8, int4;
  int fewest_stages, most_stages;
};

static const Kernel kKernels[] = {
    {sparse24::launch_sixteen_bits, sparse24::launch_int8, sparse24::launch_fp8, sparse24::launch_int4, 2, 4},
    {sparse24::launch_wgmma_sixteen_bits, sparse24::launch_wgmma_int8, sparse24::launch_wgmma_fp8,
     sparse24::launch_wgmma_int4, 3, 6},
    {sparse24::launch_tma_sixteen_bits, sparse24::launch_tma_int8, sparse24::launch_tma_fp8,
     sparse24::launch_tma_int4, 3, 6},
};

// 0, a CUDA error, or -1: no such instance. The launch is queued on `stream`; nothing waits.
SPARSE24_EXPORT int sparse24_mma_sp(const Problem* problem, const Launch* launch, void* stream) {
  if (launch->kernel < 0 || launch->kernel > 2 || launch->warps < 1 || launch->warps > 8) {
    return sparse24::kUnsupported;
  }
  const Kernel& kernel = kKernels[launch->kernel];
  if (problem->stages < kernel.fewest_stages || problem->stages > kernel.most_stages) return sparse24::kUnsupported;
  switch (static_cast<Format>(launch->format)) {
    case Format::kSixteenBits:
      return kernel.sixteen_bits(*problem, *launch, stream);
    case Format::kInt8:
      return kernel.int8(*problem, *launch, stream);
    case Format::kFp8:
      return kernel.fp8(*problem, *launch, stream);
    case Format::kInt4:
      return kernel.int4(*problem, *launch, stream);
  }
  return sparse24::kUnsupported;
}

#ifdef SPARSE24_EMULATE
// The tensors that the emulated kernel may touch, and when asynchronous copies land.
SPARSE24_EXPORT void sparse24_emulate(const machine::Range* ranges, int count, int eager) {
  machine::emulator.ranges.assign(ranges, ranges + count);
  machine::emulator.eager_copies = eager & 1;
  machine::emulator.eager_products = eager >> 1 & 1;
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
