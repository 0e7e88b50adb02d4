// The few things the kernel asks of its machine: an NVIDIA GPU under nvcc, an emulated one under a C++ compiler.
//
// With SPARSE24_EMULATE the same kernel source runs thread by thread on the CPU (emulator.h), so that its
// addresses, barriers, fragment layouts and arithmetic can be tested where there is no GPU.
#pragma once

#include <cstdint>

// Four 32-bit words that move at once.
struct alignas(16) Words4 {
  uint32_t w[4];
};
struct alignas(8) Words2 {
  uint32_t w[2];
};

// The two 16-bit types of activations and results, and what their products sum into.
struct Bf16 {
  static constexpr bool is_half = false;
  static constexpr int bytes = 2;
  using Sum = float;
};
struct Fp16 {
  static constexpr bool is_half = true;
  static constexpr int bytes = 2;
  using Sum = float;
};
// The 8-bit types that products take as they are.
struct E4m3 {
  static constexpr int bytes = 1;
  using Sum = float;
};
struct Int8 {
  static constexpr int bytes = 1;
  using Sum = int32_t;
};

#ifdef SPARSE24_EMULATE

#include "emulator.h"
#define SPARSE24_DEVICE inline
#define SPARSE24_BOTH constexpr
#define SPARSE24_KERNEL(threads) inline void

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SPARSE24_DEVICE __device__ __forceinline__
#define SPARSE24_BOTH constexpr __host__ __device__
#define SPARSE24_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)

namespace machine {

// 1024: the tensor cores of compute capability 9.0 permute addresses within so many bytes.
extern __shared__ __align__(1024) unsigned char shared_memory[];

SPARSE24_DEVICE int thread_index() { return threadIdx.x; }
SPARSE24_DEVICE int block_threads() { return blockDim.x; }
SPARSE24_DEVICE int block_x() { return blockIdx.x; }
SPARSE24_DEVICE int block_y() { return blockIdx.y; }
SPARSE24_DEVICE int block_z() { return blockIdx.z; }
SPARSE24_DEVICE int grid_x() { return gridDim.x; }
SPARSE24_DEVICE int grid_z() { return gridDim.z; }
SPARSE24_DEVICE void sync_block() { __syncthreads(); }

template <class T>
SPARSE24_DEVICE T load_shared(int offset) {
  return *reinterpret_cast<const T*>(shared_memory + offset);
}
SPARSE24_DEVICE void store_shared(int offset, float value) {
  *reinterpret_cast<float*>(shared_memory + offset) = value;
}

// Blocks that share a cluster (compute capability 9.0 and later; never called elsewhere).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
SPARSE24_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// Every thread of the cluster has come here, and what it wrote before can be read.
SPARSE24_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// From the shared memory of another block of the cluster.
SPARSE24_DEVICE float load_shared_of(int rank, int offset) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset));
  uint32_t remote;
  float value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
  return value;
}
#else
SPARSE24_DEVICE int cluster_rank() { return 0; }
SPARSE24_DEVICE void sync_cluster() {}
SPARSE24_DEVICE float load_shared_of(int, int) { return 0.0f; }
#endif

template <class T>
SPARSE24_DEVICE T load_global(const T* address) {
  return __ldg(address);
}
template <class T>
SPARSE24_DEVICE void store_global(T* address, T value) {
  *address = value;
}

// 16 bytes of weights to shared memory, past L1: each byte is read once.
SPARSE24_DEVICE void copy_weights(int offset, const void* source) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}
// 8 bytes of activations to shared memory, or zeros.
SPARSE24_DEVICE void copy_activations(int offset, const void* source, bool inside) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source), "r"(inside ? 8 : 0)
               : "memory");
}
SPARSE24_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's groups of copies are under way.
SPARSE24_DEVICE void wait_copies(int pending) {
  if (pending == 0) {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  } else if (pending == 1) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else if (pending == 2) {
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  }
}

// Says that a value is to stay in its register: the compiler would work out some addresses again every time.
SPARSE24_DEVICE void keep(int& value) { asm volatile("" : "+r"(value)); }

SPARSE24_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}
// (value & mask) ^ magic in one instruction; compilers take two where both are constants.
SPARSE24_DEVICE uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t magic) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(value), "r"(mask), "r"(magic));
  return result;
}
SPARSE24_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
SPARSE24_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// a * b + c in both halves, rounded once, subnormal numbers kept.
template <class T>
SPARSE24_DEVICE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  if constexpr (T::is_half) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}
template <class T>
SPARSE24_DEVICE uint16_t round_to_sixteen_bits(float value) {
  if constexpr (T::is_half) {
    return __half_as_ushort(__float2half_rn(value));
  } else {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}
template <class T>
SPARSE24_DEVICE float from_sixteen_bits(uint16_t bits) {
  if constexpr (T::is_half) {
    return __half2float(__ushort_as_half(bits));
  } else {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  }
}

// acc[16x8] += A[16x32, 2:4] * B[32x8]; SELECTOR 0: metadata comes from threads 0 and 1 of each four, 1: 2 and 3.
// PTX ISA, "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types". The sums are tied to the
// same registers, so no order of the instruction with others needs to be forced.
template <class T, int SELECTOR>
SPARSE24_DEVICE void mma_sp(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
#define SPARSE24_MMA(type)                                                                                \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                         \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"                      \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),           \
        "r"(metadata), "n"(SELECTOR))
  if constexpr (T::is_half) {
    SPARSE24_MMA("f16");
  } else {
    SPARSE24_MMA("bf16");
  }
#undef SPARSE24_MMA
}

}  // namespace machine

#endif
