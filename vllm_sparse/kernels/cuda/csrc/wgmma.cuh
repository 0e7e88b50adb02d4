// Hopper's sparse matrix product of a warpgroup, wgmma.mma_async.sp, and what belongs to it. Compute capability
// 9.0 only (code for sm_90a); in machine code for others the functions are empty and never called.
//
// PTX ISA, "Asynchronous warpgroup-level matrix multiply-accumulate operation using sparse matrices". A, kept
// values and metadata, comes from registers in the same shares as mma.sp.m16n8k32's (m16n8k64's for 8-bit numbers),
// warp w holding the rows 16 w to 16 w + 15; B comes from shared memory, [tokens x columns] in K-major order with the
// 128-byte swizzle.
#pragma once

#include <type_traits>

#include "machine.cuh"

#ifndef SPARSE24_EMULATE

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSE24_HAS_WGMMA 1
#else
#define SPARSE24_HAS_WGMMA 0
#endif

namespace machine {

// Where B lies: 14 bits of the address over 16, 1024 bytes from one eight of tokens to the next, swizzle of 128
// bytes (PTX ISA, "Matrix descriptor format"). `offset` counts from the start of shared memory.
SPARSE24_DEVICE uint64_t matrix_descriptor(int offset) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset));
  return static_cast<uint64_t>(address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 |
         uint64_t{1} << 62;
}

// What this thread's copies have put into shared memory becomes visible to the tensor cores.
SPARSE24_DEVICE void show_copies_to_tensor_cores() {
#if SPARSE24_HAS_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
SPARSE24_DEVICE void begin_products() {
#if SPARSE24_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
SPARSE24_DEVICE void commit_products() {
#if SPARSE24_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most PENDING of the warpgroup's groups of products are under way.
template <int PENDING>
SPARSE24_DEVICE void wait_products() {
#if SPARSE24_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

#define SPARSE24_SUMS_8 "%0, %1, %2, %3"
#define SPARSE24_SUMS_16 SPARSE24_SUMS_8 ", %4, %5, %6, %7"
#define SPARSE24_SUMS_32 SPARSE24_SUMS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARSE24_SUMS_64                                                        \
  SPARSE24_SUMS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
                   "%27, %28, %29, %30, %31"
#define SPARSE24_SUMS_128 \
  SPARSE24_SUMS_64 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48" \
  ", %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSE24_SUMS_256 \
  SPARSE24_SUMS_128 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80" \
  ", %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97" \
  ", %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112" \
  ", %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126" \
  ", %127"
#define SPARSE24_FOUR(c, j) "+" c(acc[j][0]), "+" c(acc[j][1]), "+" c(acc[j][2]), "+" c(acc[j][3])
#define SPARSE24_TILES_8(c) SPARSE24_FOUR(c, 0)
#define SPARSE24_TILES_16(c) SPARSE24_TILES_8(c), SPARSE24_FOUR(c, 1)
#define SPARSE24_TILES_32(c) SPARSE24_TILES_16(c), SPARSE24_FOUR(c, 2), SPARSE24_FOUR(c, 3)
#define SPARSE24_TWO_FOURS(c, j) SPARSE24_FOUR(c, j), SPARSE24_FOUR(c, j + 1)
#define SPARSE24_EIGHT_FOURS(c, j) \
  SPARSE24_TWO_FOURS(c, j), SPARSE24_TWO_FOURS(c, j + 2), SPARSE24_TWO_FOURS(c, j + 4), SPARSE24_TWO_FOURS(c, j + 6)
#define SPARSE24_TILES_64(c) SPARSE24_TILES_32(c), SPARSE24_TWO_FOURS(c, 4), SPARSE24_TWO_FOURS(c, 6)
#define SPARSE24_TILES_128(c) SPARSE24_TILES_64(c), SPARSE24_EIGHT_FOURS(c, 8)
#define SPARSE24_TILES_256(c) SPARSE24_TILES_128(c), SPARSE24_EIGHT_FOURS(c, 16), SPARSE24_EIGHT_FOURS(c, 24)

// The operands after the sums, by their numbers.
#define SPARSE24_OPERANDS_8 "{%4, %5, %6, %7}, %8, %9, %10"
#define SPARSE24_ADD_8 "%11"
#define SPARSE24_OPERANDS_16 "{%8, %9, %10, %11}, %12, %13, %14"
#define SPARSE24_ADD_16 "%15"
#define SPARSE24_OPERANDS_32 "{%16, %17, %18, %19}, %20, %21, %22"
#define SPARSE24_ADD_32 "%23"
#define SPARSE24_OPERANDS_64 "{%32, %33, %34, %35}, %36, %37, %38"
#define SPARSE24_ADD_64 "%39"
#define SPARSE24_OPERANDS_128 "{%64, %65, %66, %67}, %68, %69, %70"
#define SPARSE24_ADD_128 "%71"
#define SPARSE24_OPERANDS_256 "{%128, %129, %130, %131}, %132, %133, %134"
#define SPARSE24_ADD_256 "%135"

// `types` names the instruction from the depth on, `rest` is what follows the predicate.
#define SPARSE24_WGMMA(tokens, types, rest, c)                                              \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " SPARSE24_ADD_##tokens ", 0;\n"        \
               "wgmma.mma_async.sp.sync.aligned.m64n" #tokens types                         \
               " {" SPARSE24_SUMS_##tokens "}, " SPARSE24_OPERANDS_##tokens ", add" rest ";\n}" \
               : SPARSE24_TILES_##tokens(c)                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(SELECTOR), "r"(add))

// acc[64 x 8 TILES] = A[64 x COLUMNS, 2:4] * B[COLUMNS x 8 TILES], plus acc if `add`; COLUMNS are 32 numbers of 16 bits
// or 64 of 8. Begun here and done when wait_products says so; until then nothing may touch acc, a and the memory
// behind b. Sums begin with `add` 0 rather than as zeros: the compiler makes products wait for each other where
// anything else writes their registers.
template <class E, int SELECTOR, int TILES>
SPARSE24_DEVICE void wgmma_sp(typename E::Sum (&acc)[TILES][4], const uint32_t (&a)[4], uint64_t b, uint32_t metadata,
                             int add) {
#if SPARSE24_HAS_WGMMA
#define SPARSE24_WGMMA_OF(tokens)                                  \
  if constexpr (std::is_same_v<E, Fp16>) {                         \
    SPARSE24_WGMMA(tokens, "k32.f32.f16.f16", ", 1, 1, 0", "f");   \
  } else if constexpr (std::is_same_v<E, Bf16>) {                  \
    SPARSE24_WGMMA(tokens, "k32.f32.bf16.bf16", ", 1, 1, 0", "f"); \
  } else if constexpr (std::is_same_v<E, E4m3>) {                  \
    SPARSE24_WGMMA(tokens, "k64.f32.e4m3.e4m3", ", 1, 1", "f");    \
  } else {                                                         \
    SPARSE24_WGMMA(tokens, "k64.s32.s8.s8", "", "r");              \
  }
  if constexpr (TILES == 1) {
    SPARSE24_WGMMA_OF(8)
  } else if constexpr (TILES == 2) {
    SPARSE24_WGMMA_OF(16)
  } else if constexpr (TILES == 4) {
    SPARSE24_WGMMA_OF(32)
  } else if constexpr (TILES == 8) {
    SPARSE24_WGMMA_OF(64)
  } else if constexpr (TILES == 16) {
    SPARSE24_WGMMA_OF(128)
  } else {
    static_assert(TILES == 32, "instances are of 8, 16, 32, 64, 128 and 256 tokens");
    SPARSE24_WGMMA_OF(256)
  }
#undef SPARSE24_WGMMA_OF
#endif
}

#undef SPARSE24_WGMMA
#undef SPARSE24_SUMS_8
#undef SPARSE24_SUMS_16
#undef SPARSE24_SUMS_32
#undef SPARSE24_SUMS_64
#undef SPARSE24_SUMS_128
#undef SPARSE24_SUMS_256
#undef SPARSE24_FOUR
#undef SPARSE24_TWO_FOURS
#undef SPARSE24_EIGHT_FOURS
#undef SPARSE24_OPERANDS_8
#undef SPARSE24_ADD_8
#undef SPARSE24_OPERANDS_16
#undef SPARSE24_ADD_16
#undef SPARSE24_OPERANDS_32
#undef SPARSE24_ADD_32
#undef SPARSE24_OPERANDS_64
#undef SPARSE24_OPERANDS_128
#undef SPARSE24_OPERANDS_256
#undef SPARSE24_ADD_64
#undef SPARSE24_ADD_128
#undef SPARSE24_ADD_256
#undef SPARSE24_TILES_8
#undef SPARSE24_TILES_16
#undef SPARSE24_TILES_32
#undef SPARSE24_TILES_64
#undef SPARSE24_TILES_128
#undef SPARSE24_TILES_256

}  // namespace machine

#endif
