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
// New barriers become visible to the copies and to the other blocks of the cluster.
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
// One arrival at the barrier of block `rank` of the cluster. It says that reads are over and orders no writes: with the
// cluster as its scope it would cost a fence of the whole GPU's memory.
SPARSE24_DEVICE void arrive_at(int rank, int offset) {
#if SPARSE24_HAS_WGMMA
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(offset)),
      "r"(rank)
      : "memory");
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
// The same into the same place of every block of the cluster that has its bit in `blocks`, and counted by its barrier.
SPARSE24_DEVICE void copy_box_to_all(const TensorMap& map, int offset, int barrier, int x, int y, int blocks) {
#if SPARSE24_HAS_WGMMA
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(offset)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(static_cast<uint16_t>(blocks))
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

// Until `threads` threads, whole warps, have come here.
SPARSE24_DEVICE void sync_threads_of(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
SPARSE24_DEVICE void sync_warp() { __syncwarp(); }

// Four transposed 8 x 8 matrices of 16-bit numbers to shared memory; lane l says where row l % 8 of matrix l / 8 goes.
// PTX ISA, "stmatrix": lane l holds the elements (column l / 4, rows 2 * (l % 4) and the next) of each.
SPARSE24_DEVICE void store_transposed(int offset, const uint32_t (&m)[4]) {
#if SPARSE24_HAS_WGMMA
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(offset)),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
#endif
}

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
