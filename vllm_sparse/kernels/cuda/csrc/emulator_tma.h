// The emulated GPU's tensor memory accelerator: boxes of tensors that come when they like, and barriers that count.
//
// A box comes at once, or only when no thread can go on without it, several in any order. What is written over too
// early, or read before it was waited for, then gives a different result.
#pragma once

#include "emulator.h"

namespace machine {

// A barrier of a block that has threads left: the memory of others is gone.
inline CountingBarrier& counting_barrier(Block& block, int offset) {
  static CountingBarrier nowhere;
  if (block.live == 0) fail("use of a barrier of a block that has ended");
  const auto found = block.counting.find(offset);
  if (found != block.counting.end()) return found->second;
  fail("no barrier was made at " + std::to_string(offset));
  return nowhere;
}

inline void end_phase_if_complete(CountingBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  emulator.idle = 0;
}

inline void init_barrier(int offset, int count) {
  if (check_shared(offset, 8)) here().counting[offset] = CountingBarrier{count, count, 0, 0};
}
inline void show_barriers() {}

inline void wait_barrier(int offset, int parity) {
  CountingBarrier& barrier = counting_barrier(here(), offset);
  while (barrier.phase % 2 == parity && emulator.error.empty()) yield();
}
inline void arrive(CountingBarrier& barrier) {
  if (--barrier.pending < 0) fail("more arrivals at a barrier than it counts");
  end_phase_if_complete(barrier);
}
inline void announce_bytes(int offset, int bytes) {
  CountingBarrier& barrier = counting_barrier(here(), offset);
  barrier.bytes += bytes;
  arrive(barrier);
}
inline void arrive_at(int offset) {
  arrive(counting_barrier(here(), offset));
  // Whoever waited for this may go first.
  yield();
}

// One element at `target`, whose address is permuted within rows of the swizzle's size: PTX ISA, "Swizzling modes".
inline void put(Block& block, int target, const void* source, int bytes, int swizzle_bytes) {
  const int chunks = swizzle_bytes / 16;
  const int address = target ^ (target >> 7 & (chunks - 1)) << 4;
  if (address + bytes > static_cast<int>(block.shared.size())) {
    fail("a box beyond shared memory at " + std::to_string(address));
  } else if (source == nullptr) {
    std::memset(&block.shared[address], 0, bytes);
  } else {
    std::memcpy(&block.shared[address], source, bytes);
  }
}

// What lies outside the tensor comes as zeros, and counts.
inline void land(const Transfer& transfer) {
  const TensorMap& map = transfer.map;
  Block& block = *transfer.block;
  int64_t count = 1;
  for (int i = 0; i < map.rank; ++i) count *= map.box[i];
  for (int64_t at = 0; at < count; ++at) {
    int64_t rest = at;
    const char* source = map.base;
    bool inside = true;
    for (int i = 0; i < map.rank; ++i) {
      const int64_t index = transfer.from[i] + rest % map.box[i];
      inside &= index >= 0 && index < map.sizes[i];
      source += index * map.strides[i];
      rest /= map.box[i];
    }
    if (inside && !check_global(source, map.element_bytes)) return;
    const int target = transfer.offset + static_cast<int>(at) * map.element_bytes;
    put(block, target, inside ? source : nullptr, map.element_bytes, map.swizzle_bytes);
  }
  CountingBarrier& barrier = counting_barrier(block, transfer.barrier);
  barrier.bytes -= count * map.element_bytes;
  end_phase_if_complete(barrier);
}

// The box that comes next, if one is under way.
inline bool land_a_transfer() {
  std::vector<Transfer>& all = emulator.transfers;
  if (all.empty()) return false;
  const size_t chosen = emulator.seed ? shuffled(emulator.seed) % all.size() : 0;
  const Transfer transfer = all[chosen];
  all.erase(all.begin() + static_cast<std::ptrdiff_t>(chosen));
  land(transfer);
  return true;
}

// What cuTensorMapEncodeTiled and the instruction refuse, or answer with garbage.
inline bool check_box(const TensorMap& map, int offset) {
  const int inner = map.box[0] * map.element_bytes;
  bool fine = offset % (8 * inner) == 0 && (inner == 32 || inner == 64 || inner == 128);
  fine &= reinterpret_cast<uintptr_t>(map.base) % 16 == 0;
  for (int i = 0; i < map.rank; ++i) {
    fine &= map.sizes[i] > 0 && map.box[i] > 0 && map.box[i] <= 256;
    fine &= i == 0 || map.strides[i] % 16 == 0;
  }
  if (!fine) fail("a box or a tensor that the copies do not take, to " + std::to_string(offset));
  return fine;
}

inline void begin_transfer(const Transfer& transfer) {
  if (!check_box(transfer.map, transfer.offset)) return;
  if (emulator.eager_copies) {
    land(transfer);
  } else {
    emulator.transfers.push_back(transfer);
  }
}
inline void prefetch_map(const TensorMap&) {}
inline void copy_box(const TensorMap& map, int offset, int barrier, int x, int y) {
  begin_transfer({map, offset, barrier, {x, y, 0, 0}, &here()});
}
inline void copy_box(const TensorMap& map, int offset, int barrier, int y, int z, int w) {
  begin_transfer({map, offset, barrier, {0, y, z, w}, &here()});
}

template <int COUNT>
void give_registers() {}
template <int COUNT>
void take_registers() {}

inline void sync_warp() { wait(here().warps[thread_index() / 32].barrier, 32); }

// What every lane of the warp gives, by lane.
inline const Fragment (&gather(uint32_t value))[32] {
  Thread& self = *emulator.current;
  Warp& warp = here().warps[self.index / 32];
  Fragment(&all)[32] = warp.fragments[self.exchange];
  self.exchange ^= 1;
  all[self.index % 32].a[0] = value;
  wait(warp.barrier, 32);
  return all;
}
// Lane l holds the elements (row l / 4, columns 2 * (l % 4) and the next) of an 8 x 8 matrix, before and after: PTX
// ISA, "movmatrix".
inline uint32_t transpose(uint32_t pair) {
  const Fragment(&all)[32] = gather(pair);
  const int lane = thread_index() % 32, row = lane / 4, column = 2 * (lane % 4);
  const auto element = [&](int of_row, int of_column) {
    return all[4 * of_row + of_column / 2].a[0] >> (16 * (of_column % 2)) & 0xFFFF;
  };
  return element(column, row) | element(column + 1, row) << 16;
}
inline uint32_t swap_with_neighbour(uint32_t value) { return gather(value)[thread_index() % 32 ^ 1].a[0]; }

}  // namespace machine
