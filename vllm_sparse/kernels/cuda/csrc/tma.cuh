// Tiles of tensors that the hardware copies to shared memory by itself, and the barriers that count what has come:
// the tensor memory accelerator of compute capability 9.0. In machine code for others the functions are empty and
// never called.
//
// PTX ISA, "cp.async.bulk.tensor" (tiled mode) and "mbarrier". Offsets count from the start of shared memory.
#pragma once

#include "wgmma.cuh"

#ifdef SPARSE24_EMULATE

#define SPARSE24_GRID_CONSTANT

#else

#include <cuda.h>
#define SPARSE24_GRID_CONSTANT __grid_constant__

namespace machine {

using TensorMap = CUtensorMap;

SPARSE24_DEVICE uint32_t shared_address(int offset) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory + offset));
}

// A phase ends after `count` arrivals and when all bytes that were announced have come.
SPARSE24_DEVICE void init_barrier(int offset, int count) {
#if SPARSE24_HAS_WGMMA
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(offset)), "r"(count) : "memory");
#endif
}
// New barriers become visible to the copies.
SPARSE24_DEVICE void show_barriers() {
#if SPARSE24_HAS_WGMMA
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// Until the phase of this parity has ended; the first has parity 0, and the one before it counts as ended.
SPARSE24_DEVICE void wait_barrier(int offset, int parity) {
#if SPARSE24_HAS_WGMMA
  asm volatile(
      "{\n.reg .pred ended;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@!ended bra AGAIN;\n}" ::"r"(shared_address(offset)),
      "r"(parity)
      : "memory");
#endif
}
// One arrival, and `bytes` more to come in this phase.
SPARSE24_DEVICE void announce_bytes(int offset, int bytes) {
#if SPARSE24_HAS_WGMMA
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(offset)), "r"(bytes)
               : "memory");
#endif
}
// One arrival, which says that reads are over.
SPARSE24_DEVICE void arrive_at(int offset) {
#if SPARSE24_HAS_WGMMA
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(offset)) : "memory");
#endif
}

SPARSE24_DEVICE void prefetch_map(const TensorMap& map) {
#if SPARSE24_HAS_WGMMA
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}
// Begin the copy of a box of two dimensions, its first element at (x, y), innermost first.
SPARSE24_DEVICE void copy_box(const TensorMap& map, int offset, int barrier, int x, int y) {
#if SPARSE24_HAS_WGMMA
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(offset)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
#endif
}
// Four dimensions, the innermost from its start.
SPARSE24_DEVICE void copy_box(const TensorMap& map, int offset, int barrier, int y, int z, int w) {
#if SPARSE24_HAS_WGMMA
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(offset)),
      "l"(&map), "r"(shared_address(barrier)), "r"(0), "r"(y), "r"(z), "r"(w)
      : "memory");
#endif
}

// Registers of each thread of this warpgroup from here on: those that one gives up another can take.
template <int COUNT>
SPARSE24_DEVICE void give_registers() {
#if SPARSE24_HAS_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
SPARSE24_DEVICE void take_registers() {
#if SPARSE24_HAS_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

SPARSE24_DEVICE void sync_warp() { __syncwarp(); }

// An 8 x 8 matrix of 16-bit numbers, transposed: lane l holds the elements (row l / 4, columns 2 * (l % 4) and the
// next) before and after (PTX ISA, "movmatrix").
SPARSE24_DEVICE uint32_t transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}
// What the other of two lanes gives.
SPARSE24_DEVICE uint32_t swap_with_neighbour(uint32_t value) { return __shfl_xor_sync(0xFFFFFFFFu, value, 1); }

}  // namespace machine

#endif

namespace sparse24 {

// What a launch's blocks of threads copy from.
struct TensorMaps {
  machine::TensorMap activations;
  machine::TensorMap values;
  machine::TensorMap codes;
};

}  // namespace sparse24
