// From a launch's numbers to the instance of the kernel, on the device or in the emulator.
#pragma once

#include "mma_sp_kernel.cuh"
#include "wgmma_sp_kernel.cuh"

namespace sparse24 {

constexpr int kUnsupported = -1;

#ifdef SPARSE24_EMULATE
using Kernel = void (*)(Problem);

inline int start(Kernel kernel, const Problem& p, const Launch& launch, int row_blocks, int passes, int shared,
                 void* stream) {
  machine::Emulator& e = machine::emulator;
  uint32_t seed = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(stream));
  machine::body = [&p, kernel] { kernel(p); };
  e.grid_z = launch.splits;
  const int together = p.cluster ? launch.splits : 1;
  for (int z = 0; z < launch.splits; z += together) {
    for (int y = 0; y < row_blocks; ++y) {
      for (int x = 0; x < passes; ++x) {
        e.blocks.assign(together, machine::Block{});
        for (int rank = 0; rank < together; ++rank) {
          e.blocks[rank].place[0] = x, e.blocks[rank].place[1] = y, e.blocks[rank].place[2] = z + rank;
          // Memory that nobody wrote holds NaN.
          e.blocks[rank].shared.assign(shared, 0xFF);
        }
        machine::run_cluster(32 * launch.warps, seed ? seed++ : 0);
        if (!e.error.empty()) return 1;
      }
    }
  }
  return 0;
}
#else
using Kernel = void (*)(Problem);

inline int start(Kernel kernel, const Problem& p, const Launch& launch, int row_blocks, int passes, int shared,
                 void* stream) {
  // A fact about the function, not about the stream: allowed during a capture.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  // Passes over the tokens of the same rows are neighbours: the second finds its weights in the L2 cache.
  const dim3 grid(passes, row_blocks, launch.splits);
  if (!p.cluster) {
    kernel<<<grid, 32 * launch.warps, shared, static_cast<cudaStream_t>(stream)>>>(p);
    return cudaGetLastError();
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = launch.splits;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = 32 * launch.warps;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p);
}
#endif

template <class T, Format F, int TOKEN_TILES, int ROW_TILES>
int sized(const Problem& p, const Launch& launch, void* stream) {
  const int rows = 16 * ROW_TILES * launch.warps, tokens = 8 * TOKEN_TILES;
  const int shared = p.stages * stage_bytes<F>(launch.warps, ROW_TILES, TOKEN_TILES);
  return start(mma_sp_24<T, F, TOKEN_TILES, ROW_TILES>, p, launch, (p.n + rows - 1) / rows,
               (p.m + tokens - 1) / tokens, shared, stream);
}

template <class T, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
int sized_wgmma(const Problem& p, const Launch& launch, void* stream) {
  constexpr int rows = 16 * ROW_TILES * WARPS, tokens = 8 * TOKEN_TILES;
  const int shared = p.stages * half_stage_bytes<F>(WARPS, ROW_TILES, TOKEN_TILES);
  return start(wgmma_sp_24<T, F, TOKEN_TILES, ROW_TILES, WARPS>, p, launch, (p.n + rows - 1) / rows,
               (p.m + tokens - 1) / tokens, shared, stream);
}

template <class T, Format F>
int dispatch(const Problem& p, const Launch& launch, void* stream) {
  switch (10 * launch.token_tiles + launch.row_tiles) {
    case 11:
      return sized<T, F, 1, 1>(p, launch, stream);
    case 21:
      return sized<T, F, 2, 1>(p, launch, stream);
    case 41:
      return sized<T, F, 4, 1>(p, launch, stream);
    case 42:
      return sized<T, F, 4, 2>(p, launch, stream);
    // Int4 keeps a second set of sums for its scale groups: 32 rows of 64 tokens would not fit the registers.
    case 81:
      if constexpr (F == Format::kInt4) return sized<T, F, 8, 1>(p, launch, stream);
      return kUnsupported;
    case 82:
      if constexpr (F != Format::kInt4) return sized<T, F, 8, 2>(p, launch, stream);
      return kUnsupported;
    default:
      return kUnsupported;
  }
}

template <class T, Format F, int TOKEN_TILES>
int dispatch_wgmma_rows(const Problem& p, const Launch& launch, void* stream) {
  switch (10 * launch.row_tiles + launch.warps) {
    case 14:
      return sized_wgmma<T, F, TOKEN_TILES, 1, 4>(p, launch, stream);
    case 18:
      return sized_wgmma<T, F, TOKEN_TILES, 1, 8>(p, launch, stream);
    case 24:
      return sized_wgmma<T, F, TOKEN_TILES, 2, 4>(p, launch, stream);
    case 28:
      return sized_wgmma<T, F, TOKEN_TILES, 2, 8>(p, launch, stream);
    default:
      return kUnsupported;
  }
}

template <class T, Format F>
int dispatch_wgmma(const Problem& p, const Launch& launch, void* stream) {
  switch (launch.token_tiles) {
    case 1:
      return dispatch_wgmma_rows<T, F, 1>(p, launch, stream);
    case 2:
      return dispatch_wgmma_rows<T, F, 2>(p, launch, stream);
    case 4:
      return dispatch_wgmma_rows<T, F, 4>(p, launch, stream);
    case 8:
      return dispatch_wgmma_rows<T, F, 8>(p, launch, stream);
    default:
      return kUnsupported;
  }
}

template <Format F>
int dispatch_wgmma_type(const Problem& p, const Launch& launch, void* stream) {
  return launch.half ? dispatch_wgmma<Fp16, F>(p, launch, stream) : dispatch_wgmma<Bf16, F>(p, launch, stream);
}

template <Format F>
int dispatch_type(const Problem& p, const Launch& launch, void* stream) {
  return launch.half ? dispatch<Fp16, F>(p, launch, stream) : dispatch<Bf16, F>(p, launch, stream);
}

int launch_sixteen_bits(const Problem& p, const Launch& launch, void* stream);
int launch_int8(const Problem& p, const Launch& launch, void* stream);
int launch_fp8(const Problem& p, const Launch& launch, void* stream);
int launch_int4(const Problem& p, const Launch& launch, void* stream);
int launch_wgmma_sixteen_bits(const Problem& p, const Launch& launch, void* stream);
int launch_wgmma_int8(const Problem& p, const Launch& launch, void* stream);
int launch_wgmma_fp8(const Problem& p, const Launch& launch, void* stream);
int launch_wgmma_int4(const Problem& p, const Launch& launch, void* stream);

}  // namespace sparse24
