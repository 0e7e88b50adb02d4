// A GPU for tests: the threads of one block, or of a cluster of blocks, as coroutines, shared memory, asynchronous
// copies, sparse products.
//
// It is stricter than the hardware. Every address is checked (global ones against the tensors of the call,
// shared ones against the size asked for) and must be aligned. Asynchronous copies land at the latest moment
// that is allowed, or at once: code that needs a wait it does not do, or reuses memory too early, computes a
// different result in one of the two modes. Threads run in an order that the seed shuffles between barriers; with an
// odd seed one warp is much slower than the others, with an even one a block of a cluster.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace machine {

struct Range {
  const char* start;
  int64_t bytes;
};

struct Copy {
  int offset;
  const void* source;
  int bytes;
  bool inside;
  int group;
};

struct Fragment {
  uint32_t a[4];
  uint32_t b[4];
  uint32_t metadata;
};

// A wgmma_sp that was begun.
struct Product {
  int group;
  std::function<void()> finish;
};

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

struct Warp {
  Barrier barrier;
  Fragment fragments[2][32];
};

// An mbarrier: its phase ends when nothing is pending and no announced byte is missing.
struct CountingBarrier {
  int count = 0;
  int pending = 0;
  int64_t bytes = 0;
  int phase = 0;
};

// What cuTensorMapEncodeTiled is told; dimensions innermost first.
struct TensorMap {
  const char* base;
  int element_bytes;
  int rank;
  int64_t sizes[4];
  int64_t strides[4];
  int box[4];
  int swizzle_bytes;
};

struct Block;

// A box on its way to a block's shared memory.
struct Transfer {
  TensorMap map;
  int offset;
  int barrier;
  int64_t from[4];
  Block* block;
};

struct Block {
  std::vector<unsigned char> shared;
  std::map<int, CountingBarrier> counting;  // by offset
  std::vector<Warp> warps;
  std::vector<Barrier> groups;  // of four warps
  Barrier barrier;
  int place[3] = {0, 0, 0};
  int live = 0;  // threads that have not ended
};

struct Thread {
  ucontext_t context;
  Block* block = nullptr;
  std::vector<char> stack;
  std::vector<Copy> copies;
  std::vector<Product> products;
  int index = 0;
  int open_group = 0;
  int open_products = 0;
  int exchange = 0;
  bool done = false;
};

struct Emulator {
  std::vector<Thread> threads;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<Range> ranges;
  std::vector<Transfer> transfers;
  Barrier barrier;  // of the cluster
  uint32_t seed = 0;
  ucontext_t scheduler;
  Thread* current = nullptr;
  int grid_x = 1;
  int grid_z = 1;
  int live = 0;
  bool eager_copies = false;
  bool eager_products = false;
  int64_t idle = 0;
  std::string error;
};

inline Emulator emulator;

inline uint32_t shuffled(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

// The block of the thread that runs.
inline Block& here() { return *emulator.current->block; }

inline void fail(const std::string& what) {
  if (!emulator.error.empty()) return;
  emulator.error = what;
  if (emulator.current == nullptr) return;
  const int(&place)[3] = here().place;
  emulator.error += " (thread " + std::to_string(emulator.current->index) + ", block " + std::to_string(place[0]) +
                    "," + std::to_string(place[1]) + "," + std::to_string(place[2]) + ")";
}

inline void yield() { swapcontext(&emulator.current->context, &emulator.scheduler); }

inline void wait(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    emulator.idle = 0;
    return;
  }
  while (barrier.generation == generation && emulator.error.empty()) yield();
}

inline int thread_index() { return emulator.current->index; }
inline int block_threads() { return static_cast<int>(emulator.threads.size() / emulator.blocks.size()); }
inline int block_x() { return here().place[0]; }
inline int block_y() { return here().place[1]; }
inline int block_z() { return here().place[2]; }
inline void sync_block() { wait(here().barrier, block_threads()); }
inline int grid_x() { return emulator.grid_x; }
inline int grid_z() { return emulator.grid_z; }
inline int cluster_rank() { return static_cast<int>(&here() - emulator.blocks.data()); }
inline void sync_cluster() { wait(emulator.barrier, static_cast<int>(emulator.threads.size())); }

inline bool check_global(const void* address, int bytes) {
  const char* start = static_cast<const char*>(address);
  for (const Range& range : emulator.ranges) {
    if (start >= range.start && start + bytes <= range.start + range.bytes) {
      if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return true;
      fail("misaligned access of " + std::to_string(bytes) + " bytes to global memory");
      return false;
    }
  }
  fail("access of " + std::to_string(bytes) + " bytes outside the call's tensors");
  return false;
}

inline bool check_shared(int offset, int bytes) {
  if (offset < 0 || offset + bytes > static_cast<int>(here().shared.size())) {
    fail("access beyond shared memory at " + std::to_string(offset));
    return false;
  }
  if (offset % bytes) {
    fail("misaligned access of " + std::to_string(bytes) + " bytes to shared memory");
    return false;
  }
  return true;
}

template <class T>
T load_shared(int offset) {
  T value{};
  if (check_shared(offset, sizeof(T))) std::memcpy(&value, &here().shared[offset], sizeof(T));
  return value;
}
inline void store_shared(int offset, float value) {
  if (check_shared(offset, sizeof(value))) std::memcpy(&here().shared[offset], &value, sizeof(value));
}
inline float load_shared_of(int rank, int offset) {
  float value{};
  if (check_shared(offset, sizeof(value))) {
    std::memcpy(&value, &emulator.blocks[rank].shared[offset], sizeof(value));
  }
  return value;
}
template <class T>
T load_global(const T* address) {
  T value{};
  if (check_global(address, sizeof(T))) std::memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
void store_global(T* address, T value) {
  if (check_global(address, sizeof(T))) std::memcpy(address, &value, sizeof(T));
}

inline void land(const Copy& copy) {
  if (!check_shared(copy.offset, copy.bytes)) return;
  if (!copy.inside) {
    std::memset(&here().shared[copy.offset], 0, copy.bytes);
  } else if (check_global(copy.source, copy.bytes)) {
    std::memcpy(&here().shared[copy.offset], copy.source, copy.bytes);
  }
}
inline void begin_copy(int offset, const void* source, int bytes, bool inside) {
  const Copy copy{offset, source, bytes, inside, emulator.current->open_group};
  if (emulator.eager_copies) {
    land(copy);
  } else {
    emulator.current->copies.push_back(copy);
  }
}
inline void copy_weights(int offset, const void* source) { begin_copy(offset, source, 16, true); }
inline void copy_activations(int offset, const void* source, bool inside) {
  begin_copy(offset, source, 8, inside);
}
inline void commit_copies() { ++emulator.current->open_group; }
inline void wait_copies(int pending) {
  Thread& self = *emulator.current;
  std::vector<Copy> later;
  for (const Copy& copy : self.copies) {
    if (copy.group < self.open_group - pending) {
      land(copy);
    } else {
      later.push_back(copy);
    }
  }
  self.copies.swap(later);
}

inline void keep(int&) {}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t source = low | static_cast<uint64_t>(high) << 32;
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const int nibble = selector >> (4 * byte) & 15;
    uint32_t picked = static_cast<uint32_t>(source >> (8 * (nibble & 7))) & 0xFF;
    if (nibble & 8) picked = picked & 0x80 ? 0xFF : 0;
    result |= picked << (8 * byte);
  }
  return result;
}
inline uint32_t and_xor(uint32_t value, uint32_t mask, uint32_t magic) { return (value & mask) ^ magic; }
inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Written from the formats' definitions, so that they depend on no compiler's 16-bit types.
template <class T>
double value_of(uint16_t bits) {
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent_bits = T::is_half ? 5 : 8, mantissa_bits = T::is_half ? 10 : 7;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}
template <class E>
double number_of_byte(uint8_t bits) {
  if constexpr (std::is_same_v<E, Int8>) return static_cast<int8_t>(bits);
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7F) == 0x7F) return std::nan("");
  const double size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return bits & 0x80 ? -size : size;
}
template <class T>
uint16_t nearest(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int exponent_bits = T::is_half ? 5 : 8, mantissa_bits = T::is_half ? 10 : 7;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  if (std::isnan(value)) return infinity | 1;
  const double size = std::fabs(value);
  if (std::isinf(size)) return sign | infinity;
  if (size == 0) return sign;
  int exponent = std::max(std::ilogb(size), 1 - bias);
  // nearbyint rounds ties to even, as the hardware does.
  double mantissa = std::nearbyint(std::ldexp(size, mantissa_bits - exponent));
  if (mantissa >= (2 << mantissa_bits)) {
    mantissa /= 2;
    ++exponent;
  }
  if (exponent > bias) return sign | infinity;
  const int digits = static_cast<int>(mantissa);
  if (digits < (1 << mantissa_bits)) return sign | static_cast<uint16_t>(digits);
  return sign | static_cast<uint16_t>((exponent + bias) << mantissa_bits | (digits - (1 << mantissa_bits)));
}

template <class T>
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int half = 0; half < 2; ++half) {
    const int shift = 16 * half;
    const double sum = value_of<T>(a >> shift & 0xFFFF) * value_of<T>(b >> shift & 0xFFFF) +
                       value_of<T>(c >> shift & 0xFFFF);
    result |= static_cast<uint32_t>(nearest<T>(sum)) << shift;
  }
  return result;
}
template <class T>
uint16_t round_to_sixteen_bits(float value) {
  return nearest<T>(value);
}
template <class T>
float from_sixteen_bits(uint16_t bits) {
  return static_cast<float>(value_of<T>(bits));
}

// The instruction as the PTX ISA describes it ("Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16
// types", figures of A, B, C and metadata). Lane = 4 * g + t.
//   A: kept values [16 x 16]; register 0: row g, slots 2t and 2t+1; 1: row g+8; 2 and 3: the same, slots + 8.
//   B: [32 x 8]; register r: rows 8r+2t and 8r+2t+1 of column g.
//   C: rows g (0, 1) and g+8 (2, 3), columns 2t and 2t+1.
//   Metadata of row r: in the lanes 4*(r%8) + 2*selector + {0: columns 0-15, 1: columns 16-31}, low half for
//   rows 0-7, high half for rows 8-15; four bits per group of 4 columns, lower index in the lower two.
// `activation` of a k (0..31) is the number that B has there in the output's column.
template <class Activation>
double row_times(const Fragment (&lanes)[32], int selector, int row, double (*number)(uint16_t),
                 Activation activation) {
  double sum = 0;
  for (int slot = 0; slot < 16; ++slot) {
    const int group = slot / 2;
    const uint32_t pair = lanes[4 * (row % 8) + group % 4].a[row / 8 + 2 * (group / 4)];
    const uint32_t word = lanes[4 * (row % 8) + 2 * selector + group / 4].metadata;
    const int code = word >> (16 * (row / 8) + 4 * (group % 4)) & 15;
    if ((code & 3) >= code >> 2) fail("metadata " + std::to_string(code) + " is not in order");
    const int k = 4 * group + (slot % 2 ? code >> 2 : code & 3);
    sum += number(static_cast<uint16_t>(pair >> (16 * (slot % 2)))) * number(activation(k));
  }
  return sum;
}

template <class T, int SELECTOR>
void mma_sp(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  Thread& self = *emulator.current;
  const int lane = self.index % 32, g = lane / 4, t = lane % 4;
  Warp& warp = here().warps[self.index / 32];
  Fragment(&all)[32] = warp.fragments[self.exchange];
  self.exchange ^= 1;
  std::memcpy(all[lane].a, a, sizeof(a));
  std::memcpy(all[lane].b, b, sizeof(b));
  all[lane].metadata = metadata;
  wait(warp.barrier, 32);
  for (int out = 0; out < 4; ++out) {
    const int row = g + 8 * (out / 2), column = 2 * t + out % 2;
    const double sum = row_times(all, SELECTOR, row, value_of<T>, [&all, column](int k) {
      return static_cast<uint16_t>(all[4 * column + k % 8 / 2].b[k / 8] >> (16 * (k % 2)));
    });
    acc[out] = static_cast<float>(acc[out] + sum);
  }
}

// Hopper's product of four warps, as the PTX ISA describes it ("Asynchronous warpgroup-level matrix instructions",
// sparse): A and metadata are shared out within each warp as above, for the warp's own 16 rows; B is read from
// shared memory through the descriptor when the product is done, which is as late as the waits allow, or at once.
// Memory that is refilled too early, or sums that are used too early, then give a different result.
inline uint64_t matrix_descriptor(int offset) {
  if (offset % 16 || offset >> 4 >= 1 << 14) fail("a descriptor cannot say address " + std::to_string(offset));
  return static_cast<uint64_t>(offset >> 4) | uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}
inline void show_copies_to_tensor_cores() {}
inline void begin_products() {}

// Element [k, token] of B: rows of 128 bytes per token, eights of tokens apart by the descriptor's stride; the
// 16-byte part of the address is XORed with its bits 7 to 9.
inline uint16_t activation_of(uint64_t descriptor, int k, int token) {
  const int start = static_cast<int>(descriptor & 0x3FFF) << 4;
  const int stride = static_cast<int>(descriptor >> 32 & 0x3FFF) << 4;
  const int address = start + token / 8 * stride + token % 8 * 128 + 2 * k;
  return load_shared<uint16_t>(address ^ (address >> 7 & 7) << 4);
}

// One number of B in 16 or 8 bits; 8-bit numbers lie as 16-bit ones do, by their bytes.
template <class E>
double activation_number(uint64_t descriptor, int k, int token) {
  const uint16_t bits = activation_of(descriptor, k * E::bytes / 2, token);
  if constexpr (E::bytes == 2) {
    return value_of<E>(bits);
  } else {
    return number_of_byte<E>(static_cast<uint8_t>(bits >> (8 * (k % 2))));
  }
}

// Row `row` (0..15) of a warp's share of A times column `token` of B. 8-bit numbers (PTX ISA, fragments and metadata of
// sparse mma.m16n8k64): register r of a lane has the slots 16 * (r / 2) + 4t to 4t + 3 of row g + 8 * (r % 2); the
// lanes' metadata are of row g + 8 * (t % 2), groups 8 * (t / 2) to 8 * (t / 2) + 7.
template <class E>
double sparse_row(const Fragment (&lanes)[32], int selector, int row, uint64_t b, int token) {
  if constexpr (E::bytes == 2) {
    return row_times(lanes, selector, row, value_of<E>,
                     [b, token](int k) { return activation_of(b, k, token); });
  } else {
    if (selector != 0) fail("8-bit products take metadata of all lanes");
    double sum = 0;
    for (int slot = 0; slot < 32; ++slot) {
      const int group = slot / 2, part = slot % 16;
      const uint32_t word = lanes[4 * (row % 8) + part / 4].a[row / 8 + 2 * (slot / 16)];
      const uint32_t codes = lanes[4 * (row % 8) + row / 8 + 2 * (group / 8)].metadata;
      const int code = codes >> (4 * (group % 8)) & 15;
      if ((code & 3) >= code >> 2) fail("metadata " + std::to_string(code) + " is not in order");
      const int k = 4 * group + (slot % 2 ? code >> 2 : code & 3);
      sum += number_of_byte<E>(static_cast<uint8_t>(word >> (8 * (part % 4)))) * activation_number<E>(b, k, token);
    }
    return sum;
  }
}

template <class E, int SELECTOR, int TILES>
void wgmma_sp(typename E::Sum (&acc)[TILES][4], const uint32_t (&a)[4], uint64_t b, uint32_t metadata, int add) {
  Thread& self = *emulator.current;
  const int lane = self.index % 32;
  Fragment(&all)[32] = here().warps[self.index / 32].fragments[self.exchange];
  self.exchange ^= 1;
  std::memcpy(all[lane].a, a, sizeof(a));
  all[lane].metadata = metadata;
  wait(here().groups[self.index / 128], 128);
  struct Shares {
    Fragment lanes[32];
  } shares;
  std::memcpy(shares.lanes, all, sizeof(all));
  auto* const sums = acc;
  Product product{self.open_products, [sums, shares, b, add, lane] {
                    for (int at = 0; at < 4 * TILES; ++at) {
                      auto& sum = sums[at / 4][at % 4];
                      const int row = lane / 4 + 8 * (at % 4 / 2), token = 8 * (at / 4) + 2 * (lane % 4) + at % 2;
                      const double product = sparse_row<E>(shares.lanes, SELECTOR, row, b, token);
                      sum = static_cast<typename E::Sum>((add ? static_cast<double>(sum) : 0.0) + product);
                    }
                  }};
  if (emulator.eager_products) {
    product.finish();
  } else {
    self.products.push_back(std::move(product));
  }
}
inline void commit_products() { ++emulator.current->open_products; }
template <int PENDING>
void wait_products() {
  Thread& self = *emulator.current;
  std::vector<Product> later;
  for (const Product& product : self.products) {
    if (product.group < self.open_products - PENDING) {
      product.finish();
    } else {
      later.push_back(product);
    }
  }
  self.products.swap(later);
}

}  // namespace machine

#include "emulator_tma.h"

namespace machine {

inline std::function<void()> body;

inline void enter() {
  body();
  emulator.current->done = true;
  --emulator.live;
  --here().live;
  emulator.idle = 0;
  yield();
}

// Apart from its caller: getcontext may return twice for all that the compiler knows.
inline void prepare(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = thread.stack.data();
  thread.context.uc_stack.ss_size = thread.stack.size();
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, enter, 0);
}

// How often the others run before a slow warp or block runs once.
constexpr int kPasses = 4;

// Runs the blocks of a cluster, whose places and shared memory are set, to their ends.
inline void run_cluster(int threads, uint32_t seed) {
  Emulator& e = emulator;
  e.barrier = Barrier{};
  e.transfers.clear();
  e.seed = seed;
  const int total = threads * static_cast<int>(e.blocks.size());
  for (Block& block : e.blocks) {
    block.barrier = Barrier{};
    block.live = threads;
    block.warps.assign(threads / 32, Warp{});
    block.groups.assign(threads / 128 + 1, Barrier{});
  }
  e.threads.resize(total);
  e.live = total;
  e.idle = 0;
  std::vector<int> order(total);
  for (int i = 0; i < total; ++i) {
    Thread& thread = e.threads[i];
    thread.stack.resize(64 << 10);
    thread.copies.clear();
    thread.products.clear();
    thread.block = &e.blocks[i / threads];
    thread.index = i % threads;
    thread.open_group = thread.open_products = thread.exchange = 0;
    thread.done = false;
    prepare(thread);
    order[i] = i;
  }
  for (int i = total - 1; seed && i > 0; --i) std::swap(order[i], order[shuffled(seed) % (i + 1)]);
  // One warp, or one block, is much slower than the others.
  const int slow_of = seed % 2 ? 32 : threads;
  const int slow = seed ? static_cast<int>(shuffled(seed) % (total / slow_of)) : -1;
  const int passes = seed ? kPasses : 1, round = passes * total;
  while (e.live > 0 && e.error.empty()) {
    for (int at = 0; at < round; ++at) {
      const int i = order[at % total];
      if (e.threads[i].done || (at < round - total && i / slow_of == slow)) continue;
      // Everybody waits: the latest moment for a box to come.
      if (e.idle > 2 * round && land_a_transfer()) e.idle = 0;
      e.current = &e.threads[i];
      if (++e.idle > 4 * round) {
        fail("the threads of a block wait for each other");
        break;
      }
      swapcontext(&e.scheduler, &e.current->context);
    }
  }
  e.current = nullptr;
}

}  // namespace machine
