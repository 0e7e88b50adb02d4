// Threads and scratch memory. The pool is ATen's, which is the OpenMP pool that vLLM binds to cores.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace vllm_sparse {

// Splits [0, count) into one contiguous range per thread; the same count gives the same split, so that the
// thread which first touched a panel's memory also reads it.
template <class Body>
inline void for_ranges(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// Hands out [0, count) in pieces of `step`, in order, to whichever thread asks: for work that computes more than it
// reads, where a thread that lost its core for a moment must not keep the others waiting.
class Pieces {
 public:
  Pieces(int64_t count, int64_t step) : count_(count), step_(step) {}
  // The start of the next piece; `count` or more when there is none.
  int64_t next() { return taken_.fetch_add(step_, std::memory_order_relaxed); }
  int64_t count() const { return count_; }
  int64_t end(int64_t start) const { return std::min(count_, start + step_); }
  // What the taker of the piece at `start` is likely to get after it; -1 if probably nothing.
  int64_t guess(int64_t start) const {
    const int64_t following = start + step_ * torch::stable::get_num_threads();
    return following < count_ ? following : -1;
  }

 private:
  const int64_t count_;
  const int64_t step_;
  std::atomic<int64_t> taken_{0};
};

// A cache-line aligned buffer that only grows; contents are lost on growth.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 4095) / 4096 * 4096;
    if (bytes > capacity_) {
      data_.reset(std::aligned_alloc(4096, bytes));
      capacity_ = data_ == nullptr ? 0 : bytes;
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
  size_t capacity_ = 0;
};

}  // namespace vllm_sparse
