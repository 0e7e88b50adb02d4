// Threads and scratch memory. The pool is ATen's, which is the OpenMP pool that vLLM binds to cores.
#pragma once

#include <torch/csrc/stable/ops.h>

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
