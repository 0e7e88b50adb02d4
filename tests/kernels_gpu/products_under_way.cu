// Sparse products of a warpgroup while their next operands are being loaded: right alone, and under memcheck?
//
// No kernel of ours, only the instruction and what it is documented to need. Products of stage s are under way
// while the operands of stage s + 1 are loaded into registers of their own. What is loaded and what stays fixed
// varies, so that a wrong sum says which operand was disturbed. Compute capability 9.0:
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I vllm_sparse/kernels/cuda/csrc THIS -o probe
//   ./probe && compute-sanitizer --tool memcheck ./probe
#include <cstdio>

#include "wgmma.cuh"

namespace {

constexpr int kRounds = 64, kBlocks = 132, kRepeats = 3, kColumns = 64, kOperands = 32768, kMetadata = 8192;
constexpr int kSharedBytes = 65536;

__device__ uint32_t load(int offset) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(machine::shared_memory + offset))));
  return value;
}

// A is 1 and 2 in turns, metadata keep positions (0, 1) and (2, 3) of every four; B is 1 and 3 there.
template <int TILES, bool LOADED_A, bool LOADED_METADATA, int UNDER_WAY>
__global__ void __launch_bounds__(256) multiply(int* wrong) {
  using namespace machine;
  uint16_t* const b = reinterpret_cast<uint16_t*>(shared_memory);
  uint32_t* const operands = reinterpret_cast<uint32_t*>(shared_memory + kOperands);
  for (int i = threadIdx.x; i < 8 * TILES * kColumns; i += blockDim.x) b[i] = i % 4 < 2 ? 0x3F80 : 0x4040;
  for (int odd = 0; odd < 2; ++odd) {
    operands[odd * 256 + threadIdx.x] = odd ? 0x40004000u : 0x3F803F80u;
    operands[kMetadata / 4 + odd * 256 + threadIdx.x] = odd ? 0xEEEEEEEEu : 0x44444444u;
  }
  show_copies_to_tensor_cores();
  sync_block();
  float sums[TILES][4];
  float expected = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int odd = round % 2, at = kOperands + 4 * (odd * 256 + threadIdx.x);
    uint32_t a[2][4], metadata[2];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[step][i] = LOADED_A ? load(at) : 0x3F803F80u;
      metadata[step] = LOADED_METADATA ? load(at + kMetadata) : 0x44444444u;
    }
    begin_products();
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      wgmma_sp<Bf16, 0, TILES>(sums, a[step], matrix_descriptor(64 * step), metadata[step], round > 0 || step > 0);
    }
    commit_products();
    wait_products<UNDER_WAY>();
    expected += 2 * 16.0f * (LOADED_A && odd ? 2 : 1) * (LOADED_METADATA && odd ? 3 : 1);
  }
  wait_products<0>();
  int found = 0;
  for (int i = 0; i < 4 * TILES; ++i) found += sums[i / 4][i % 4] != expected;
  if (found) atomicAdd(wrong, 1);
}

template <int TILES, bool LOADED_A, bool LOADED_METADATA, int UNDER_WAY>
int count_wrong(int threads) {
  const auto kernel = multiply<TILES, LOADED_A, LOADED_METADATA, UNDER_WAY>;
  int *wrong, result = -1;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  cudaMalloc(&wrong, sizeof(int));
  cudaMemset(wrong, 0, sizeof(int));
  for (int repeat = 0; repeat < kRepeats; ++repeat) kernel<<<kBlocks, threads, kSharedBytes>>>(wrong);
  const cudaError_t error = cudaMemcpy(&result, wrong, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(wrong);
  std::printf("%3d tokens, %d threads, A %s, metadata %s, %d groups under way: %s, %d of %d threads wrong\n", 8 * TILES,
              threads, LOADED_A ? "loaded" : "fixed", LOADED_METADATA ? "loaded" : "fixed", UNDER_WAY,
              cudaGetErrorString(error), result, kRepeats * kBlocks * threads);
  return error != cudaSuccess || result != 0;
}

template <int TILES>
int all(int threads) {
  return count_wrong<TILES, true, true, 1>(threads) + count_wrong<TILES, true, false, 1>(threads) +
         count_wrong<TILES, false, true, 1>(threads) + count_wrong<TILES, false, false, 1>(threads) +
         count_wrong<TILES, true, true, 0>(threads);
}

}  // namespace

int main() {
  return all<8>(128) + all<8>(256) + all<16>(128) + all<16>(256) + all<32>(128) ? 1 : 0;
}
