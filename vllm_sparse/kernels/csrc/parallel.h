// Threads and scratch memory. The pool is ATen's, which is the OpenMP pool that vLLM binds to cores.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace vllm_sparse {

// Splits [0, count) into one contiguous range per thread; the same count gives the same split, so that the
// thread which first touched a panel's memory also reads it.
template <class Body>
inline void for_ranges(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

// Hands out [0, count) in pieces of `step`: each thread gets its own range first, the one that for_ranges gives it, whose
// memory it first touched; then it helps the others, so that nobody waits for a thread that lost its core for a moment.
class Pieces {
 public:
  Pieces(int64_t count, int64_t step)
      : count_(count), step_(step), share_(ceil_share(count)), cursors_((count + share_ - 1) / share_) {
    for (size_t i = 0; i < cursors_.size(); ++i) cursors_[i].at.store(i * share_, std::memory_order_relaxed);
  }
  // Calls body(first, last, following) for one piece after another until none is left. `begin` is where the caller's own
  // range starts; `following` is where its next piece probably does, -1 if nothing of this range is left.
  template <class Body>
  void run(int64_t begin, const Body& body) {
    const size_t own = begin / share_;
    for (size_t i = 0; i < cursors_.size(); ++i) {
      const size_t range = (own + i) % cursors_.size();
      const int64_t end = std::min(count_, static_cast<int64_t>(range + 1) * share_);
      for (;;) {
        const int64_t first = cursors_[range].at.fetch_add(step_, std::memory_order_relaxed);
        if (first >= end) break;
        const int64_t last = std::min(end, first + step_);
        body(first, last, last < end ? last : -1);
      }
    }
  }

 private:
  static int64_t ceil_share(int64_t count) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    return std::max<int64_t>(1, (count + threads - 1) / threads);
  }
  struct alignas(64) Cursor {
    std::atomic<int64_t> at{0};
  };
  const int64_t count_;
  const int64_t step_;
  const int64_t share_;
  std::vector<Cursor> cursors_;
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
