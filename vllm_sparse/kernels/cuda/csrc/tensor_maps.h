// Descriptions of the tensors for the tensor memory accelerator, made on the host for each launch and passed by value.
#pragma once

#include "wgmma_sp_tma_kernel.cuh"

#ifndef SPARSE24_EMULATE
#include <cuda_runtime.h>
#endif

namespace sparse24 {

// Dimensions, innermost first; strides in bytes of all but the innermost.
struct Described {
  const void* base;
  int element_bytes;
  int rank;
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
};

#ifdef SPARSE24_EMULATE

inline int describe(machine::TensorMap* map, const Described& tensor) {
  map->base = static_cast<const char*>(tensor.base);
  map->element_bytes = tensor.element_bytes;
  map->rank = tensor.rank;
  for (int i = 0; i < tensor.rank; ++i) {
    map->sizes[i] = static_cast<int64_t>(tensor.sizes[i]);
    map->box[i] = static_cast<int>(tensor.box[i]);
    map->strides[i] = i ? static_cast<int64_t>(tensor.strides[i - 1]) : tensor.element_bytes;
  }
  map->swizzle_bytes = static_cast<int>(tensor.box[0]) * tensor.element_bytes;
  return 0;
}

#else

// The driver's function, through the runtime: the library links no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? function : nullptr);
  }();
  return found;
}

inline CUtensorMapSwizzle swizzle_of(uint32_t bytes) {
  return bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : CU_TENSOR_MAP_SWIZZLE_32B;
}

// Addresses are permuted within the innermost side of the box, which is 32, 64 or 128 bytes.
inline int describe(CUtensorMap* map, const Described& tensor) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      tensor.element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const CUresult result =
      encode(map, type, tensor.rank, const_cast<void*>(tensor.base), tensor.sizes, tensor.strides, tensor.box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(tensor.box[0] * tensor.element_bytes),
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif

// Activations [m, k] in boxes of 128 bytes of columns and the tokens of a tile.
inline Described describe_activations(const Problem& p, int bytes, int tokens) {
  return {p.x,
          bytes,
          2,
          {static_cast<uint64_t>(p.k), static_cast<uint64_t>(p.m)},
          {static_cast<uint64_t>(bytes * p.stride_x)},
          {static_cast<uint32_t>(kAtomBytes / bytes), static_cast<uint32_t>(tokens)}};
}

// Values [row_blocks, tiles, 16 rows, a tile's row]: both tiles of a block of columns at a time.
inline Described describe_values(const Problem& p, int row_bytes, int row_blocks) {
  const uint64_t row = row_bytes, tile = 16 * row, tiles = 2 * static_cast<uint64_t>(p.k_blocks);
  return {p.packed,
          1,
          4,
          {row, 16, tiles, static_cast<uint64_t>(p.row_blocks)},
          {row, tile, tile * tiles},
          {static_cast<uint32_t>(row_bytes), 16, 2, static_cast<uint32_t>(row_blocks)}};
}

// Codes [row_blocks, k_blocks, 16 rows, 32 groups].
inline Described describe_codes(const Problem& p, int row_blocks) {
  const uint64_t blocks = p.k_blocks;
  return {p.packed + p.metadata_offset,
          1,
          4,
          {kTileGroups, 16, blocks, static_cast<uint64_t>(p.row_blocks)},
          {kTileGroups, kMetadataBytes, kMetadataBytes * blocks},
          {kTileGroups, 16, 1, static_cast<uint32_t>(row_blocks)}};
}

}  // namespace sparse24
