// From a launch's numbers to the instance of the kernel, on the device or in the emulator.
#pragma once

#include "mma_sp_kernel.cuh"
#include "tensor_maps.h"
#include "wgmma_sp_kernel.cuh"
#include "wgmma_sp_tma_kernel.cuh"

namespace sparse24 {

constexpr int kUnsupported = -1;

// Blocks of threads, and how many neighbours along y and z are a cluster.
struct Grid {
  int x, y, z;
  int threads;
  int shared;  // bytes a block
  int cluster_y = 1;
  int cluster_z = 1;
};

#ifdef SPARSE24_EMULATE

template <class... Arguments>
int start(void (*kernel)(Arguments...), const Grid& grid, void* stream, const Arguments&... arguments) {
  machine::Emulator& e = machine::emulator;
  uint32_t seed = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(stream));
  machine::body = [&] { kernel(arguments...); };
  e.grid_x = grid.x;
  e.grid_z = grid.z;
  const int together = grid.cluster_y * grid.cluster_z;
  for (int z = 0; z < grid.z; z += grid.cluster_z) {
    for (int y = 0; y < grid.y; y += grid.cluster_y) {
      for (int x = 0; x < grid.x; ++x) {
        e.blocks.assign(together, machine::Block{});
        for (int rank = 0; rank < together; ++rank) {
          machine::Block& block = e.blocks[rank];
          block.place[0] = x, block.place[1] = y + rank % grid.cluster_y, block.place[2] = z + rank / grid.cluster_y;
          // Memory that nobody wrote holds NaN.
          block.shared.assign(grid.shared, 0xFF);
        }
        machine::run_cluster(grid.threads, seed ? seed++ : 0);
        if (!e.error.empty()) return 1;
      }
    }
  }
  return 0;
}

#else

template <class... Arguments>
int start(void (*kernel)(Arguments...), const Grid& grid, void* stream, const Arguments&... arguments) {
  // A fact about the function, not about the stream: allowed during a capture.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = 1;
  cluster.val.clusterDim.y = grid.cluster_y;
  cluster.val.clusterDim.z = grid.cluster_z;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = grid.cluster_y * grid.cluster_z > 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

#endif

// Passes over the tokens of the same rows are neighbours: the second finds its weights in the L2 cache.
inline Grid grid_of(const Problem& p, int warps, int rows, int tokens, int shared) {
  return {(p.m + tokens - 1) / tokens, (p.n + rows - 1) / rows, p.splits, 32 * warps, shared, 1,
          p.cluster ? p.splits : 1};
}

template <class T, Format F, int TOKEN_TILES, int ROW_TILES>
int sized(const Problem& p, const Launch& launch, void* stream) {
  const int shared = p.stages * stage_bytes<F>(launch.warps, ROW_TILES, TOKEN_TILES);
  const Grid grid = grid_of(p, launch.warps, 16 * ROW_TILES * launch.warps, 8 * TOKEN_TILES, shared);
  return start(mma_sp_24<T, F, TOKEN_TILES, ROW_TILES>, grid, stream, p);
}

template <class T, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
int sized_wgmma(const Problem& p, void* stream) {
  const int shared = p.stages * half_stage_bytes<F>(WARPS, ROW_TILES, TOKEN_TILES);
  const Grid grid = grid_of(p, WARPS, 16 * ROW_TILES * WARPS, 8 * TOKEN_TILES, shared);
  return start(wgmma_sp_24<T, F, TOKEN_TILES, ROW_TILES, WARPS>, grid, stream, p);
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
      return sized_wgmma<T, F, TOKEN_TILES, 1, 4>(p, stream);
    case 18:
      return sized_wgmma<T, F, TOKEN_TILES, 1, 8>(p, stream);
    case 24:
      return sized_wgmma<T, F, TOKEN_TILES, 2, 4>(p, stream);
    case 28:
      return sized_wgmma<T, F, TOKEN_TILES, 2, 8>(p, stream);
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

template <class T, class E, Format F, int TOKEN_TILES, int ROW_TILES, int WARPS>
int sized_tma(const Problem& p, void* stream) {
  using At = Places<F, TOKEN_TILES, ROW_TILES, WARPS>;
  TensorMaps maps;
  int error = describe(&maps.activations, describe_activations(p, E::bytes, At::kTokens));
  if (!error) error = describe(&maps.values, describe_values(p, At::kRowBytes, At::kRowBlocks));
  if (!error) error = describe(&maps.codes, describe_codes(p, At::kRowBlocks));
  if (error) return error;
  const Tiles tiles = Tiles::of(p, At::kRows, At::kTokens);
  const int blocks = p.programs > 0 && p.programs < tiles.count ? p.programs : tiles.count;
  const Grid grid{blocks, 1, 1, 32 * WARPS + kCopierThreads, At::bytes(p.stages, p.slots)};
  return start(wgmma_sp_tma_24<T, E, F, TOKEN_TILES, ROW_TILES, WARPS>, grid, stream, p, tiles, maps);
}

// Without 32 rows a warp of 128 tokens, whose sums leave too few registers for the rest.
template <class T, class E, Format F>
int dispatch_tma(const Problem& p, const Launch& launch, void* stream) {
  switch (100 * launch.token_tiles + 10 * launch.row_tiles + launch.warps) {
    case 818:
      return sized_tma<T, E, F, 8, 1, 8>(p, stream);
    case 828:
      return sized_tma<T, E, F, 8, 2, 8>(p, stream);
    case 1614:
      return sized_tma<T, E, F, 16, 1, 4>(p, stream);
    case 1618:
      return sized_tma<T, E, F, 16, 1, 8>(p, stream);
    case 3218:
      return sized_tma<T, E, F, 32, 1, 8>(p, stream);
    default:
      return kUnsupported;
  }
}

template <class T, Format F>
int dispatch_tma_operands(const Problem& p, const Launch& launch, void* stream) {
  if (!launch.eight_bits) return dispatch_tma<T, T, F>(p, launch, stream);
  if constexpr (F == Format::kInt8) return dispatch_tma<T, Int8, F>(p, launch, stream);
  if constexpr (F == Format::kFp8) return dispatch_tma<T, E4m3, F>(p, launch, stream);
  return kUnsupported;
}

template <Format F>
int dispatch_tma_type(const Problem& p, const Launch& launch, void* stream) {
  return launch.half ? dispatch_tma_operands<Fp16, F>(p, launch, stream)
                     : dispatch_tma_operands<Bf16, F>(p, launch, stream);
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
int launch_tma_sixteen_bits(const Problem& p, const Launch& launch, void* stream);
int launch_tma_int8(const Problem& p, const Launch& launch, void* stream);
int launch_tma_fp8(const Problem& p, const Launch& launch, void* stream);
int launch_tma_int4(const Problem& p, const Launch& launch, void* stream);

}  // namespace sparse24
